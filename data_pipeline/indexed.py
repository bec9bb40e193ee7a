"""Megatron's indexed data sets, `PREFIX.bin` and `PREFIX.idx`, as Megatron-LM, Megatron-Core, NeMo and GPT-NeoX write them.

The index: `MMIDIDX\\0\\0`, version 1 (uint64), code of the token dtype (uint8), numbers of sequences and of document bounds (uint64
each), tokens of each sequence (int32), its first byte in the .bin (int64), and the bounds of documents in sequences (int64). A
multimodal set has a mode (int8) per sequence behind that. Source: megatron/core/datasets/indexed_dataset.py of Megatron-Core 0.16.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.errors import SourceError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Codes of whole numbers; 6 and 7 are floats, which are no token ids."""


class IndexedFile:
    """The documents of one data set.

    Args:
        prefix: path without `.bin` or `.idx`; either is taken off.

    Raises:
        SourceError: a file is missing, or the index is not one, or does not describe the .bin.
    """

    def __init__(self, prefix: str | Path) -> None:
        prefix = str(prefix)
        self.prefix = prefix[:-4] if prefix.endswith((".bin", ".idx")) else prefix
        self.bin_path, self.idx_path = Path(f"{self.prefix}.bin"), Path(f"{self.prefix}.idx")
        try:
            index, self.num_bytes = self.idx_path.read_bytes(), os.stat(self.bin_path).st_size
        except OSError as error:
            raise SourceError(
                f"{error.filename} cannot be read ({error.strerror}): an indexed data set is the two files {self.prefix}.bin and "
                f"{self.prefix}.idx"
            ) from error
        self._parse(index)
        self._check()

    @property
    def num_documents(self) -> int:
        """Documents, empty ones too."""
        return len(self._bounds) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens, end marks included."""
        return int(self._lengths.sum(dtype=np.int64))

    def documents(self, first: int = 0) -> Iterator[tuple[np.ndarray, int]]:
        """Tokens of each document from `first` on, int64 [num_tokens], and the bytes of the .bin that are read by then."""
        stops = self._pointers + self._lengths * self.dtype.itemsize
        if not self.num_bytes:
            return
        tokens = np.memmap(self.bin_path, dtype=np.uint8, mode="r")
        for begin, end in zip(self._bounds[first:-1].tolist(), self._bounds[first + 1 :].tolist(), strict=True):
            pieces = [tokens[self._pointers[i] : stops[i]].view(self.dtype).astype(np.int64) for i in range(begin, end)]
            yield np.concatenate(pieces) if pieces else np.empty(0, np.int64), int(stops[end - 1]) if end else 0

    def _fail(self, what: str) -> SourceError:
        return SourceError(f"{self.idx_path} {what}. Copy both files again, or make them anew.")

    def _parse(self, index: bytes) -> None:
        if index[: len(_MAGIC)] != _MAGIC:
            kind = "the older TNTIDX format, which is not read" if index[:6] == b"TNTIDX" else "no index of Megatron"
            raise self._fail(f"is {kind}")
        start = len(_MAGIC) + _HEADER.size
        if len(index) < start:
            raise self._fail(f"is cut at {len(index)} bytes")
        version, code, sequences, bounds = _HEADER.unpack(index[len(_MAGIC) : start])
        if version != 1 or code not in _DTYPES:
            raise self._fail(f"has version {version} and dtype code {code}; read are version 1 and whole numbers")
        self.dtype = np.dtype(_DTYPES[code])
        size = start + 12 * sequences + 8 * bounds
        if len(index) not in (size, size + sequences):
            raise self._fail(f"has {len(index)} bytes where {sequences} sequences and {bounds} bounds take {size}")
        self._lengths = np.frombuffer(index, "<i4", sequences, start).astype(np.int64)
        self._pointers = np.frombuffer(index, "<i8", sequences, start + 4 * sequences)
        self._bounds = np.frombuffer(index, "<i8", bounds, start + 12 * sequences)

    def _check(self) -> None:
        sizes, bounds = self._lengths * self.dtype.itemsize, self._bounds
        inside = (
            (self._lengths >= 0) & (self._pointers >= 0) & (self._pointers <= self.num_bytes - sizes)
        ).all()  # nothing of this overflows: lengths are int32
        ordered = len(bounds) > 0 and bounds[0] == 0 and bounds[-1] == len(sizes) and (np.diff(bounds) >= 0).all()
        if not inside or not ordered:
            raise self._fail(f"does not describe {self.bin_path.name} of {self.num_bytes} bytes")
