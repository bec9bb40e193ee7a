"""Answers in OpenAI's shape."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from typing import Any

from hope_megatron.serve.service import Job
from hope_megatron.serve.streams import Piece, TokenLogprob

FINISH = {"stop": "stop", "length": "length", "cancelled": "stop", None: None}


class Answer(ABC):
    """What a request is answered with: whole, or chunk by chunk.

    Args:
        model: name of the model.
        tokenizer: for the text of single tokens.
        job: counts tokens.
    """

    object, chunk_object, prefix = "", "", ""

    def __init__(self, model: str, tokenizer: Any, job: Job, num_choices: int, with_logprobs: bool) -> None:
        self.model, self.tokenizer, self.job, self.with_logprobs = model, tokenizer, job, with_logprobs
        self.id, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self.num_choices = num_choices

    def whole(self, pieces: list[list[Piece]]) -> dict[str, Any]:
        """All choices at once. pieces: by choice."""
        choices = []
        for index, parts in enumerate(pieces):
            text = "".join(part.text for part in parts)
            logprobs = [entry for part in parts for entry in part.logprobs]
            choices.append({"index": index, **self._said(text), **self._rest(logprobs, parts[-1].finish)})
        return {**self._head(self.object), "choices": choices, "usage": self.usage()}

    def first(self) -> list[dict[str, Any]]:
        """Chunks before the first text."""
        return []

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """What a piece adds."""
        choice = {"index": index, **self._added(piece.text), **self._rest(list(piece.logprobs), piece.finish)}
        return {**self._head(self.chunk_object), "choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, where it is asked for."""
        return {**self._head(self.chunk_object), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens read for this request and drawn. What a session has read before costs nothing and is not counted."""
        read, drawn = self.job.num_prompt, self.job.num_drawn
        return {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _rest(self, logprobs: list[TokenLogprob], finish: str | None) -> dict[str, Any]:
        told = self._logprobs(logprobs) if self.with_logprobs else None
        return {"logprobs": told, "finish_reason": FINISH[finish]}

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token])

    @abstractmethod
    def _said(self, text: str) -> dict[str, Any]:
        """A whole text as part of a choice."""

    @abstractmethod
    def _added(self, text: str) -> dict[str, Any]:
        """A piece of text as part of a chunk's choice."""

    @abstractmethod
    def _logprobs(self, entries: list[TokenLogprob]) -> dict[str, Any]:
        """Tokens and their log probabilities as OpenAI's interface shows them there."""


class CompletionAnswer(Answer):
    """POST /v1/completions."""

    object = chunk_object = "text_completion"
    prefix = "cmpl"

    def _said(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _added = _said

    def _logprobs(self, entries: list[TokenLogprob]) -> dict[str, Any]:
        tokens = [self._text(entry.token) for entry in entries]
        offsets = [sum(map(len, tokens[:n])) for n in range(len(tokens))]
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{self._text(token): value for token, value in entry.top} for entry in entries],
            "text_offset": offsets,
        }


class ChatAnswer(Answer):
    """POST /v1/chat/completions."""

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def first(self) -> list[dict[str, Any]]:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [
            {
                **self._head(self.chunk_object),
                "choices": [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None}],
            }
            for i in range(self.num_choices)
        ]

    def _said(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _added(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, entries: list[TokenLogprob]) -> dict[str, Any]:
        return {
            "content": [
                {**self._entry(e.token, e.logprob), "top_logprobs": [self._entry(*top) for top in e.top]}
                for e in entries
            ]
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
