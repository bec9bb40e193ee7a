"""Errors of the server, in the shape that OpenAI's clients read."""

from __future__ import annotations

from typing import Any


class ServeError(Exception):
    """What a client did wrong, or what the server cannot do now.

    Args:
        status: HTTP status.
        message: what was expected, what was found, what to do.
        code: a word for programs.
        param: the field of the request, if one is at fault.
    """

    is_user_error = True

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status in (429, 503) else {}

    def body(self) -> dict[str, Any]:
        """{"error": {...}}, as OpenAI has it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "code": self.code, "param": self.param}}


def bad_request(message: str, param: str | None = None) -> ServeError:
    """400."""
    return ServeError(400, message, code="invalid_value", param=param)
