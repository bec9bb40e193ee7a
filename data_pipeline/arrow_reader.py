"""Arrow files, as `datasets.save_to_disk` and the cache of the datasets library hold them: IPC streams, or files with a footer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_pipeline.columns import column_items, find_column
from data_pipeline.errors import SourceError, require
from data_pipeline.formats import split_compression
from data_pipeline.items import Item, ReadOptions
from data_pipeline.source_files import SourceFile
from data_pipeline.streams import Opened

_FOOTED = b"ARROW1\0\0"


def read_arrow(opened: Opened, file: SourceFile, options: ReadOptions) -> Iterator[Item]:
    """The texts of a column, row by row.

    Raises:
        SourceError: there is no such column, or it holds no text.
        OSError, ValueError: after the last whole batch of a file that is cut.
    """
    if split_compression(file.path)[1]:
        raise SourceError(f"{file.path}: an Arrow file under a further compression is not read. Decompress it first.")
    path: list[str] = []
    for batch in _batches(opened, file):
        path = path or find_column(batch.schema, options.text_field, file.path)
        column = batch.column(batch.schema.get_field_index(path[0]))
        yield from column_items(column, path, file.path, options)


def _batches(opened: Opened, file: SourceFile) -> Iterator[Any]:
    ipc = require("pyarrow.ipc", purpose=f"reading {file.path}", install="pyarrow")
    if opened.stream.peek(len(_FOOTED))[: len(_FOOTED)] != _FOOTED:  # type: ignore[attr-defined]
        yield from ipc.open_stream(opened.stream)
        return
    reader = ipc.open_file(opened.stream)
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)
