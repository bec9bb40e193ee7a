"""Files of one JSON object per line, each line sealed by a checksum: a flipped bit costs a line, never the file.

A line is `{..., "crc": "8 hexadecimal digits"}`, the CRC-32 of the same line without its last member. A file whose lines all
lack a checksum was written before there was one, and is read as it stands.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]

_SEALED = re.compile(r'^(\{.*), "crc": "([0-9a-f]{8})"\}$', re.DOTALL)


class Records(NamedTuple):
    """What a file of records holds."""

    records: list[Record]
    """The good ones in their order, without checksums."""
    damaged: list[int]
    """Numbers of the lines (1 is the first) that are not what was written."""


def seal(record: Mapping[str, Any]) -> str:
    """The line of a record, without a line end. The record must not be empty."""
    text = json.dumps(dict(record))
    return f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}'


def parse_records(data: bytes) -> Records:
    """The records of a file's bytes. Empty lines, and a last line without its line end, are passed over."""
    end = data.rfind(b"\n") + 1
    lines = [line for line in enumerate(data[:end].split(b"\n"), start=1) if line[1].strip()]
    if tail := data[end:]:  # cut short, or the last write of a writer that puts the line end first
        lines.append((data.count(b"\n") + 1, tail))
    parsed = [(number, *_parse(line)) for number, line in lines]
    any_sealed = any(sealed for _, _, sealed in parsed)
    good = [(record, sealed or not any_sealed) for _, record, sealed in parsed]
    return Records(
        [record for record, whole in good if record is not None and whole],
        [
            number
            for (number, line), (record, whole) in zip(lines, good)
            if (record is None or not whole) and line is not tail
        ],
    )


def read_records(path: Path) -> Records:
    """The records of a file; none if it does not exist."""
    try:
        return parse_records(path.read_bytes())
    except FileNotFoundError:
        return Records([], [])


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record, safe on disk when the call returns.

    A line end goes first: the last line may have been cut short by the death of its writer.
    """
    append_whole(path, ("\n" + seal(record) + "\n").encode(), sync=True)


def append_whole(path: Path, line: bytes, *, sync: bool = False) -> None:
    """Append a line, or leave the file as it was: a full disk must not leave half of one in the middle.

    Raises:
        OSError: what the system says; nothing was added.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync:
                os.fsync(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def damage_text(path: Path, damaged: Iterable[int]) -> str:
    """Names the damaged lines of a file, for a warning; empty if there are none."""
    numbers = list(damaged)
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"{path}: line {shown} is not what was written, and is left out" if numbers else ""


def _parse(line: bytes) -> tuple[Record | None, bool]:
    """(the record or None, whether its checksum is there and right)"""
    try:
        text = line.decode().rstrip("\r")
        match = _SEALED.match(text)
        if match is not None:
            body = match[1] + "}"
            return (json.loads(body), True) if zlib.crc32(body.encode()) == int(match[2], 16) else (None, False)
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None, False
    return (record if isinstance(record, dict) else None), False


def read_object(path: Path) -> Record | None:
    """The JSON object that a file holds; None if there is no such file, or it holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
