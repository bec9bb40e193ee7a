"""From the bytes of a file to its documents, one reader for each kind of file."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any, cast

from data_pipeline.arrow_reader import read_arrow
from data_pipeline.columns import column_items, find_column
from data_pipeline.errors import SourceError, require
from data_pipeline.formats import Kind, kind_of, split_compression
from data_pipeline.items import Encoding, Item, ReadOptions, checked_item
from data_pipeline.json_values import json_values
from data_pipeline.source_files import SourceFile
from data_pipeline.streams import Opened, decompressed, size_of

BOM = b"\xef\xbb\xbf"
_BLOCK = tarfile.BLOCKSIZE
# How a value begins that is written over several lines: a brace, and at most a key behind it.
_OPEN_OBJECT = re.compile(rb'\{\s*("(?:[^"\\]|\\.)*"\s*:.*)?', re.DOTALL)


def read_items(opened: Opened, file: SourceFile, options: ReadOptions) -> Iterator[Item]:
    """The documents of an open file, in order.

    Raises:
        SourceError: the file has no such column, or one that holds no text.
        exceptions of `streams.is_damage`: after the last document that can be read.
    """
    kind = kind_of(file.path) or "text"
    if kind == "parquet":
        yield from _read_parquet(opened, file, options)
    elif kind == "arrow":
        yield from read_arrow(opened, file, options)
    elif kind == "tar":
        yield from _read_tar(opened.stream, options)
    else:
        yield from _read_stream(opened.stream, kind, options)


def _read_stream(stream: IO[bytes], kind: Kind, options: ReadOptions) -> Iterator[Item]:
    if kind == "json":
        yield from _read_json(stream, options)
    elif kind == "json_lines":
        yield from _read_lines(stream, options, "json")
    elif options.text_unit == "line":
        yield from _read_lines(stream, options, "text")
    elif options.text_unit == "chunk":
        yield from _read_chunks(stream, options)
    else:
        data = stream.read(options.max_document_bytes + len(BOM) + 1).removeprefix(BOM)
        yield checked_item(data, "text", len(data) > options.max_document_bytes)


# ---- text ----------------------------------------------------------------------------------------------------------


def _read_lines(stream: IO[bytes], options: ReadOptions, encoding: Encoding, head: bytes = b"") -> Iterator[Item]:
    """One document per line. ``head`` was read from the stream before and begins with a line."""
    longest = options.max_document_bytes + 2  # with its line end
    line = _limited_line(stream, head, longest + len(BOM)).removeprefix(BOM)
    while line:
        too_long = len(line) >= longest and not line.endswith(b"\n")
        if too_long:
            _skip_line(stream)
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        yield checked_item(line, encoding, too_long or len(line) > options.max_document_bytes)
        line = stream.readline(longest)


def _limited_line(stream: IO[bytes], head: bytes, limit: int) -> bytes:
    if head.endswith(b"\n") or len(head) >= limit:
        return head
    return head + stream.readline(limit - len(head))


def _read_chunks(stream: IO[bytes], options: ReadOptions) -> Iterator[Item]:
    """Consecutive pieces of a text, cut at line ends; joined they are the file again."""
    limit = max(options.max_document_bytes, options.chunk_bytes + 1)
    data = stream.read(options.chunk_bytes)
    if data.startswith(BOM):
        data = data.removeprefix(BOM) + stream.read(len(BOM))
    while data:
        if not data.endswith(b"\n"):
            data += stream.readline(limit - len(data))
        too_long = len(data) == limit and not data.endswith(b"\n")
        if too_long:
            _skip_line(stream)
        yield checked_item(data, "text", too_long)
        data = stream.read(options.chunk_bytes)


def _skip_line(stream: IO[bytes]) -> None:
    """Pass over the rest of a line without holding it."""
    while (piece := stream.readline(1 << 20)) and not piece.endswith(b"\n"):
        pass


# ---- JSON ----------------------------------------------------------------------------------------------------------


def _read_json(stream: IO[bytes], options: ReadOptions) -> Iterator[Item]:
    """A file whose name says JSON: one record per line, an array of records, or records over several lines."""
    limit = options.max_document_bytes
    head = b""
    while not head.strip(b" \t\r\n") and (piece := stream.readline(limit + 2)):
        head = piece.removeprefix(BOM)
    first = head.lstrip(b" \t\r\n")
    if not first.startswith((b"[", b"{")) or (first.startswith(b"{") and not _is_open(first)):
        yield from _read_lines(stream, options, "json", head)
        return
    for value in json_values(stream, limit, head):
        yield Item(b"", "json", "too_long") if value is None else Item(value, "json")


def _is_open(line: bytes) -> bool:
    """Whether a value begins in this line and goes on in the next, rather than being a line that is broken."""
    if not _OPEN_OBJECT.fullmatch(line):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return not _ends_in_string(line)
    return False


def _ends_in_string(line: bytes) -> bool:
    return len(re.findall(rb'(?<!\\)(?:\\\\)*"', line)) % 2 == 1


# ---- tar -----------------------------------------------------------------------------------------------------------


class _Watched:
    """A stream that remembers the last block read, by which a tar that was cut between members is told."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._last = b""

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._last = (self._last + data)[-_BLOCK:]
        return data

    def check_end(self) -> None:
        """Raise ReadError unless the tar ended with its end mark, and nothing but padding follows."""
        if self._last != b"\0" * _BLOCK:
            raise tarfile.ReadError("the tar has no end mark: it is cut")
        while piece := self._stream.read(1 << 20):
            if piece.strip(b"\0"):
                raise tarfile.ReadError("there are more data behind the end mark of the tar, as in joined tars")


def _read_tar(stream: IO[bytes], options: ReadOptions) -> Iterator[Item]:
    """The documents of all text and JSON files of a tar; any other member counts as one document that is rejected."""
    watched = _Watched(stream)
    # One block at a time, so that the reader stops exactly at the end mark.
    with tarfile.open(fileobj=cast(Any, watched), mode="r|", bufsize=_BLOCK) as tar:
        for member in tar:
            kind = kind_of(member.name)
            if member.isdir():
                continue
            if not member.isreg() or kind in (None, "parquet", "arrow", "tar"):
                yield Item(b"", "text", "other_kind")
                continue
            content = tar.extractfile(member)
            assert content is not None and kind is not None
            yield from _read_stream(decompressed(content, member.name), kind, options)
    watched.check_end()


# ---- parquet -------------------------------------------------------------------------------------------------------


def _read_parquet(opened: Opened, file: SourceFile, options: ReadOptions) -> Iterator[Item]:
    parquet = require("pyarrow.parquet", purpose=f"reading {file.path}", install="pyarrow")
    if split_compression(file.path)[1]:
        raise SourceError(f"{file.path}: a parquet file under a further compression is not read. Decompress it first.")
    table = parquet.ParquetFile(opened.stream)
    path = find_column(table.schema_arrow, options.text_field, file.path)
    done, rows, size = 0, max(1, table.metadata.num_rows), size_of(file)
    opened.position = lambda: size * done // rows  # the reader jumps about in the file
    for batch in table.iter_batches(batch_size=256, columns=[".".join(path)]):
        for item in column_items(batch.column(0), path, file.path, options):
            done += 1
            yield item
