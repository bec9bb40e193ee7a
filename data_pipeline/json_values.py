"""JSON values out of a stream, one at a time: a file of arrays, or of values written over several lines.

Only the borders of values are looked for; what is between them stays bytes, for whoever parses it. So a file of any
size needs the memory of one value, and a value that is too long is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO

_PIECE_BYTES = 1 << 18
_OUTSIDE = re.compile(rb'[^"\[\]{},]*')  # up to the next byte that matters
_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)  # up to a quote, or a backslash that ends the piece
_SPACE = b" \t\r\n"


class IncompleteJsonError(ValueError):
    """The stream ends in the middle of a value or an array, or closes what it never opened."""


def json_values(stream: IO[bytes], limit: int, head: bytes = b"") -> Iterator[bytes | None]:
    """The values of a stream, elements of arrays each for itself, as the bytes that spell them.

    Args:
        stream: JSON values, one after the other; an array at the top level stands for its elements.
        limit: longest value in bytes; a longer one is passed over.
        head: bytes that were already read from the stream.

    Yields:
        A value, or None for one that is too long.

    Raises:
        IncompleteJsonError: after the last whole value.
    """
    splitter = _Splitter(limit)
    piece = head or stream.read(_PIECE_BYTES)
    while piece:
        yield from splitter.feed(piece)
        piece = stream.read(_PIECE_BYTES)
    yield from splitter.finish()


class _Splitter:
    """Where the scan stands: inside an array or not, how deep in the value that began, in a string or not."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._value = bytearray()
        self._is_long = False
        self._in_array = False
        self._depth = 0  # of objects and arrays inside the value
        self._in_string = False
        self._escaped = False  # the next byte belongs to a backslash

    def feed(self, piece: bytes) -> Iterator[bytes | None]:
        at = start = 0  # of what is still to be kept
        while at < len(piece):
            if self._in_string:
                at = self._skip_string(piece, at)
                continue
            at = _end_of(_OUTSIDE, piece, at)
            if at == len(piece):
                break
            mark = piece[at : at + 1]
            at += 1
            if mark == b'"':
                self._in_string = True
            elif mark in b"[{":
                if mark == b"[" and not self._in_array and not self._depth and self._is_blank(piece[start : at - 1]):
                    self._in_array, start = True, at
                    self._forget()
                else:
                    self._depth += 1
            elif mark == b"," and not self._depth:
                self._keep(piece[start : at - 1])
                yield from self._take()
                start = at
            elif mark in b"]}" and self._depth:
                self._depth -= 1
                if not self._depth and not self._in_array:  # a value at the top level ends with its bracket
                    self._keep(piece[start:at])
                    yield from self._take()
                    start = at
            elif mark == b"]" and self._in_array:
                self._keep(piece[start : at - 1])
                yield from self._take()
                self._in_array, start = False, at
            elif mark in b"]}":
                raise IncompleteJsonError(f"a {mark.decode()} closes nothing that was opened")
        self._keep(piece[start:])

    def finish(self) -> Iterator[bytes | None]:
        """The last value, if it needs no bracket to end."""
        if self._depth or self._in_string or self._in_array:
            raise IncompleteJsonError("the file ends in the middle of a JSON value")
        yield from self._take()

    def _skip_string(self, piece: bytes, at: int) -> int:
        if self._escaped:
            self._escaped = False
            at += 1
        at = _end_of(_STRING, piece, at)
        if at < len(piece):
            if piece[at : at + 1] == b'"':
                self._in_string = False
            else:
                self._escaped = True
            at += 1
        return at

    def _is_blank(self, data: bytes) -> bool:
        return not (self._value + data).strip(_SPACE) and not self._is_long

    def _keep(self, data: bytes) -> None:
        if not self._is_long:
            self._value += data if self._value else data.lstrip(_SPACE)
            self._is_long = len(self._value) > self._limit + len(_SPACE)
            if self._is_long:
                self._value.clear()

    def _take(self) -> Iterator[bytes | None]:
        value = bytes(self._value.rstrip(_SPACE))
        if self._is_long or len(value) > self._limit:
            yield None
        elif value:
            yield value
        self._forget()

    def _forget(self) -> None:
        self._value.clear()
        self._is_long = False


def _end_of(pattern: re.Pattern[bytes], piece: bytes, at: int) -> int:
    match = pattern.match(piece, at)
    assert match is not None  # both patterns match nothing as well
    return match.end()
