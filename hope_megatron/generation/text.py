"""Text out of a token stream, as soon as it is certain."""

from __future__ import annotations

from typing import Protocol


class Decodes(Protocol):
    """The one thing asked of a tokenizer here."""

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""


class TextStream:
    """Turns tokens into text piece by piece; the pieces joined are the text of all tokens.

    A token alone does not decode to its part of the text: a leading space depends on what stands before, and a byte
    token may be a third of a character. So each new piece is the difference of two decodings that start at the same
    earlier token, and an unfinished character waits for its last byte.
    """

    def __init__(self, tokenizer: Decodes) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # decodings start here: the beginning of the last piece handed out
        self._done = 0  # tokens before this one have been handed out

    def push(self, token: int) -> str:
        """Text that this token makes certain; empty while a character is unfinished."""
        self._ids.append(token)
        return self._advance(complete=False)

    def flush(self) -> str:
        """What is left at the end, with a replacement character for bytes that never became one."""
        return self._advance(complete=True)

    def _advance(self, complete: bool) -> str:
        known = self._tokenizer.decode(self._ids[self._start : self._done])
        text = self._tokenizer.decode(self._ids[self._start :])
        if not complete and text.endswith("\ufffd"):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return text[len(known) :]
