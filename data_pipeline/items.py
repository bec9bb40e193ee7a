"""What reading a file gives: documents as the file holds them, or why they cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

TextUnit = Literal["file", "line", "chunk"]
Encoding = Literal["text", "json"]


@dataclass(frozen=True)
class ReadOptions:
    """How files become documents."""

    text_field: str = "text"  # JSON field or parquet column with the text; meta.text is the field text of meta
    text_unit: TextUnit = "file"  # what one document of a plain text file is
    chunk_bytes: int = 1 << 16  # text_unit "chunk": cut at the first line end at or after this many bytes
    max_document_bytes: int = 1 << 24  # longer documents are rejected without being held in memory


class Item(NamedTuple):
    """A document as its file holds it, or the reason why it cannot be used."""

    data: bytes
    encoding: Encoding = "text"
    problem: str | None = None


def checked_item(data: bytes, encoding: Encoding, too_long: bool) -> Item:
    """A document, or its rejection for its length."""
    return Item(b"", encoding, "too_long") if too_long else Item(data, encoding)
