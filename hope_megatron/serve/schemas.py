"""Requests, as OpenAI's clients send them. What the server cannot do is refused by name, never ignored."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hope_megatron.serve.errors import ServeError, bad_request

_NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "response_format": {"type": "text"},
    "parallel_tool_calls": True,
    "store": False,
    "modalities": ["text"],
    "service_tier": "auto",
}
"""Fields of OpenAI's that are taken only with the value that changes nothing."""


class StreamSettings(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Sampling(BaseModel):
    """What both kinds of request share."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    """Name of the model; None is the one that is served."""
    n: int = Field(default=1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamSettings | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    """Not OpenAI's: keep the k most likely tokens."""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    session_id: str | None = None
    """Not OpenAI's: go on with this session; the request holds only what comes next."""
    ignore_eos: bool = False
    """Not OpenAI's: go on after the end of a document."""

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, values: Any) -> Any:
        """Take out what changes nothing, refuse what would change something."""
        if not isinstance(values, dict):
            return values
        for name, neutral in _NEUTRAL.items():
            if name in values:
                if values[name] is not None and values[name] != neutral:
                    raise bad_request(f"{name} is not supported here; leave it out", name)
                values = {key: value for key, value in values.items() if key != name}
        return values

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="after")
    def _check(self) -> Sampling:
        if len(self.stops) > 16 or any(not 0 < len(stop) <= 256 for stop in self.stops):
            raise bad_request("stop takes at most 16 strings of 1 to 256 characters", "stop")
        if self.session_id is not None and self.n > 1:
            raise bad_request("a session is one stream: n must be 1 with session_id; fork the session instead", "n")
        return self


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = ""
    max_tokens: int | None = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=20)

    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class TextPart(BaseModel):
    """A part of a message; text is the only kind."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """Its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=0)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs=true", "top_logprobs")
        return self


class ForkRequest(BaseModel):
    """POST /v1/sessions/{id}/fork."""

    model_config = ConfigDict(extra="forbid")
    to: str
    """Name of the new session."""


def parse(kind: type[BaseModel], body: bytes) -> Any:
    """A request from JSON.

    Raises:
        ServeError: 400, naming the field, what was found and what it takes.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise ServeError(
            400, f"{field or 'the request'}: {first['msg']}", code="invalid_value", param=field or None
        ) from None
