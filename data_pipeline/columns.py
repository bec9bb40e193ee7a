"""The texts in a column of an Arrow table: of parquet files and of Arrow files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_pipeline.errors import SourceError
from data_pipeline.items import Item, ReadOptions, checked_item


def column_items(column: Any, path: list[str], where: str, options: ReadOptions) -> Iterator[Item]:
    """One document per row of a column.

    Raises:
        SourceError: the column holds no text.
    """
    for value in _texts(column, path, where):
        data = value.as_py()
        if data is None:
            yield Item(b"", "text", "missing_field")
        else:
            yield checked_item(data, "text", len(data) > options.max_document_bytes)


def find_column(schema: Any, field: str, where: str) -> list[str]:
    """The path to a column of an Arrow schema: ``[field]``, or its parts when it names a field of a struct."""
    if field in schema.names:
        return [field]
    known = dict(_columns(schema))
    if field in known:
        return known[field]
    raise SourceError(
        f"{where} has no column '{field}', only {', '.join(known)}. Name the one that holds the text with --text-field."
    )


def _columns(fields: Any, parents: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """The dotted name and the path of every column, those inside of structs too."""
    import pyarrow

    for field in fields:
        path = (*parents, field.name)
        if pyarrow.types.is_struct(field.type):
            yield from _columns(field.type, path)
        else:
            yield ".".join(path), list(path)


def _texts(column: Any, path: list[str], where: str) -> Any:
    """A column of text as one of bytes, not checked to be UTF-8: whoever decodes a document counts what is not."""
    import pyarrow
    from pyarrow import compute

    if len(path) > 1:
        column = compute.struct_field(column, path[1:])
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    types = pyarrow.types
    if types.is_string(column.type) or types.is_large_string(column.type):
        return column.cast(pyarrow.large_binary())
    if types.is_string_view(column.type):
        return column.cast(pyarrow.binary_view())
    binary = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_null, types.is_fixed_size_binary)
    if not any(is_kind(column.type) for is_kind in binary):
        raise SourceError(f"column '{'.'.join(path)}' of {where} holds {column.type}, not text.")
    return column
