"""Documents out of text sources, one at a time and in a fixed order.

`data_pipeline.sources` says which files a source means, `data_pipeline.readers` how a file becomes documents. A document
that cannot be used is yielded as well, with the reason in ``problem``: whoever counts documents sees every one of them.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import SourceError
from data_pipeline.items import Encoding, ReadOptions, TextUnit
from data_pipeline.readers import read_items
from data_pipeline.source_files import SourceFile
from data_pipeline.sources import PYTHON_STDLIB, expand_sources, find_sources
from data_pipeline.streams import is_damage, open_source

__all__ = [
    "Document", "ReadOptions", "Rejected", "SourceFile", "TextUnit", "decode_documents", "document_text",
    "expand_sources", "find_sources", "iterate_documents", "iterate_texts", "python_stdlib_documents", "read_documents",
]  # fmt: skip

log = logging.getLogger(__name__)

FIELDS_SHOWN = 20


@dataclass(frozen=True)
class Document:
    """A document as read: bytes not yet decoded, or the problem that kept it from being read."""

    source: str  # name of the source file
    position: int  # number of the document in that file, from 0
    data: bytes
    encoding: Encoding = "text"
    problem: str | None = None
    file_bytes: int = 0  # how far its file had been read, in bytes as it is stored


class Rejected(Exception):
    """A document that cannot be used. The message is the reason under which it is counted.

    ``fields`` names the text fields of a record that has not the one asked for.
    """

    def __init__(self, reason: str, fields: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.fields = fields


def read_documents(file: SourceFile, options: ReadOptions | None = None) -> Iterator[Document]:
    """The documents of one file, in order. A file that breaks off ends with one ``unreadable`` document."""
    position = 0
    try:
        with ExitStack() as stack:
            opened = open_source(file, stack)
            for item in read_items(opened, file, options or ReadOptions()):
                yield Document(file.name, position, *item, file_bytes=opened.position())
                position += 1
    except Exception as error:
        if not is_damage(error):
            raise
        log.warning("%s cannot be read beyond document %d: %s", file.path, position, error)
        yield Document(file.name, position, b"", problem="unreadable", file_bytes=file.size or 0)


# ---- from bytes to text --------------------------------------------------------------------------------------------


def document_text(document: Document, text_field: str = "text") -> str:
    """Decode a document, or raise `Rejected` with the reason."""
    if document.problem is not None:
        raise Rejected(document.problem)
    try:
        if document.encoding == "text":
            return document.data.decode("utf-8")
        text = _json_field(document.data, text_field)
        text.encode("utf-8")  # JSON escapes can spell lone surrogates, which are not text
        return text
    except UnicodeError:
        raise Rejected("bad_utf8") from None


def _json_field(line: bytes, field: str) -> str:
    if not line.strip():
        raise Rejected("empty")
    try:
        record: Any = json.loads(line.decode("utf-8-sig"))  # joined files have their byte order marks in the middle
    except UnicodeError:
        raise
    except (ValueError, RecursionError):
        raise Rejected("bad_json") from None
    text = _lookup(record, field)
    if not isinstance(text, str):
        raise Rejected("missing_field", tuple(itertools.islice(_text_fields(record), FIELDS_SHOWN)))
    return text


def _lookup(record: Any, field: str) -> Any:
    """The value of a field; ``meta.text`` is a field of that name, or else the field ``text`` of ``meta``."""
    if not isinstance(record, dict):
        return None
    if field in record or "." not in field:
        return record.get(field)
    parent, _, rest = field.partition(".")
    return _lookup(record.get(parent), rest)


def _text_fields(record: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields that hold text."""
    if isinstance(record, dict) and prefix.count(".") < 4:
        for name, value in record.items():
            if isinstance(value, str):
                yield prefix + name
            else:
                yield from _text_fields(value, f"{prefix}{name}.")


def describe_missing_field(field: str, seen: Iterable[str]) -> str:
    """What to say when records have not the field asked for."""
    names = ", ".join(list(seen)[:FIELDS_SHOWN])
    found = f"their text fields are {names}" if names else "they have no field that holds text"
    return f"no text under '{field}' in the records; {found}. Name the right one with --text-field."


# ---- conveniences --------------------------------------------------------------------------------------------------


def iterate_documents(
    sources: Sequence[str | Path], options: ReadOptions | None = None, *, follow_links: bool = False
) -> Iterator[Document]:
    """Every document of the sources, usable or not, in order."""
    found = find_sources(sources, follow_links=follow_links)
    if found.left_out:
        log.warning("files left out: %s", found.left_out)
    for file in found.files:
        yield from read_documents(file, options)


def iterate_texts(
    sources: Sequence[str | Path], options: ReadOptions | None = None, *, follow_links: bool = False
) -> Iterator[str]:
    """The texts of all documents that can be decoded, in order; what a tokenizer is trained on.

    Raises:
        SourceError: there are documents, and none of them is text.
    """
    options = options or ReadOptions()
    return decode_documents(iterate_documents(sources, options, follow_links=follow_links), options.text_field)


def decode_documents(documents: Iterable[Document], text_field: str = "text") -> Iterator[str]:
    """The texts of those documents that can be decoded. What is passed over is counted in a warning at the end.

    Raises:
        SourceError: there are documents, and none of them is text.
    """
    rejected: Counter[str] = Counter()
    fields: dict[str, None] = {}
    any_text = False
    for document in documents:
        try:
            text = document_text(document, text_field)
        except Rejected as reason:
            rejected[str(reason)] += 1
            fields |= dict.fromkeys(reason.fields)
            continue
        any_text = True
        yield text
    if not rejected:
        return
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(rejected.items()))
    remedy = f" {describe_missing_field(text_field, fields)}" if rejected["missing_field"] else ""
    if not any_text:
        raise SourceError(f"none of the {rejected.total()} documents is text ({reasons}).{remedy}")
    log.warning("%d documents are passed over: %s.%s", rejected.total(), reasons, remedy)


def python_stdlib_documents() -> Iterator[Document]:
    """The Python standard library's own sources, one document per module, sorted by path.

    Text that every machine with Python has; about 11 MB. Tests, vendored packages and generated files are left out.
    """
    return iterate_documents([PYTHON_STDLIB])
