"""Messages to text, by the model's own chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hope_megatron.serve.errors import bad_request

TEMPLATE_NAME = "chat_template.jinja"


class ChatTemplate:
    """A Jinja template, as transformers has it, run in a sandbox.

    Args:
        source: text of the template.
        tokens: `bos_token` and the like, as templates name them.

    Attributes:
        plain_stops: where an answer ends that no token ends; requests with stop strings of their own do without.
    """

    def __init__(self, source: str, tokens: dict[str, str] | None = None) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        self._template, self._tokens = environment.from_string(source), tokens or {}
        self.plain_stops: tuple[str, ...] = ()

    @classmethod
    def of(cls, directory: Path) -> ChatTemplate:
        """That of an export, or the one that every export begins with."""
        from hope_megatron.convert.huggingface.tokenizer_files import CHAT_TEMPLATE

        path = directory / TEMPLATE_NAME
        template = cls(path.read_text(encoding="utf-8") if path.is_file() else CHAT_TEMPLATE)
        if template.render([{"role": "user", "content": "x"}]) == cls(CHAT_TEMPLATE).render(
            [{"role": "user", "content": "x"}]
        ):
            template.plain_stops = ("\nUser:",)  # no token ends an answer in plain text
        return template

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text that the answer follows.

        Raises:
            ServeError: 400, if the template does not take these messages.
        """
        from jinja2 import TemplateError

        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._tokens)
        except TemplateError as error:
            raise bad_request(f"the model's chat template does not take these messages: {error}", "messages") from error


def _refuse(message: str) -> Any:
    from jinja2 import TemplateError

    raise TemplateError(message)
