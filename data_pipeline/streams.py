"""The bytes of a source file: opened here or in a store, decompressed, with the position in what is stored."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import sys
import tarfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import IO, cast

from data_pipeline.errors import require
from data_pipeline.formats import split_compression
from data_pipeline.source_files import SourceFile

BUFFER_BYTES = 1 << 20
MAX_ZSTD_WINDOW_LOG = 31  # files made with --long=31 ask for a window of 2 GiB; the library's own limit is 128 MiB


@dataclass
class Opened:
    """An open source file.

    Attributes:
        stream: its content, decompressed.
        position: bytes of the stored file that have been read so far.
    """

    stream: IO[bytes]
    position: Callable[[], int]


def open_source(file: SourceFile, stack: ExitStack) -> Opened:
    """Open a source file for reading; ``stack`` closes it.

    Raises:
        SourceError: the store fails and does not come back.
        exceptions of `is_damage`: the data are cut or damaged; also while reading.
    """
    stored: IO[bytes]
    if file.is_remote:
        from data_pipeline.remote import open_remote

        stored = stack.enter_context(open_remote(file))
    else:
        stored = stack.enter_context(open(file.path, "rb", BUFFER_BYTES))  # noqa: SIM115 - the stack closes it
    stream = decompressed(stored, file.path)
    return Opened(stream, stored.tell)


def decompressed(stream: IO[bytes], path: str) -> IO[bytes]:
    """What a stream holds under the compression that its name promises. All of them fail where the data break off."""
    compression = split_compression(path)[1]
    if not compression:
        return stream
    # No further buffer around these: it would lose what was decompressed before the damage.
    if compression == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=stream))
    if compression == ".bz2":
        return cast(IO[bytes], bz2.BZ2File(stream))
    if compression == ".zst":
        zstd = _zstd(path)
        options = {zstd.DecompressionParameter.window_log_max: MAX_ZSTD_WINDOW_LOG}
        return cast(IO[bytes], zstd.ZstdFile(stream, options=options))
    return cast(IO[bytes], lzma.LZMAFile(stream))


def _zstd(path: str) -> ModuleType:
    if sys.version_info >= (3, 14):
        return require("compression.zstd", purpose=f"reading {path}", install="backports.zstd")
    return require("backports.zstd", purpose=f"reading {path}", install="backports.zstd")


def is_damage(error: Exception) -> bool:
    """Whether an error means that a file is cut or damaged, or that its disk cannot be read.

    pyarrow's errors and bad JSON are ValueErrors.
    """
    zstd = sys.modules.get("compression.zstd") or sys.modules.get("backports.zstd")
    damage = (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError, tarfile.TarError)
    return isinstance(error, damage) or (zstd is not None and isinstance(error, zstd.ZstdError))


def size_of(file: SourceFile) -> int:
    """Bytes of a source file as it is stored, 0 if the store does not say."""
    return file.size if file.size is not None else 0 if file.is_remote else os.path.getsize(file.path)
