"""Files whose SHA-256 is taken of the bytes on their way out: of what was meant, not of what a later read returns."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class FileDigest:
    """What the manifest says of a file."""

    sha256: str
    size: int


class DigestedFile:
    """A new file, written from front to end and flushed to disk; `digest` is there once it is closed."""

    def __init__(self, path: Path) -> None:
        self.digest: FileDigest | None = None
        self._sha256, self._size = hashlib.sha256(), 0
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close() or __exit__)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._size += self._file.write(data)
        self._sha256.update(data)

    def close(self) -> FileDigest:
        """Flush to disk and close."""
        if self.digest is None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self.digest = FileDigest(self._sha256.hexdigest(), self._size)
        return self.digest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


class SafetensorsFile(DigestedFile):
    """A safetensors file whose tensors are announced at the start and appended one by one, so that few are in memory."""

    def __init__(
        self,
        path: Path,
        entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(path)
        self._announced = list(entries)
        self._next = 0
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for name, dtype, shape in self._announced:
            end = offset + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        self.write(len(head).to_bytes(8, "little"))
        self.write(head)

    def append(self, name: str, tensor: Tensor) -> None:
        """Write the next announced tensor, which must be on the host."""
        assert (name, tensor.dtype, tuple(tensor.shape)) == self._announced[self._next], (
            f"{name} is not the next tensor"
        )
        self._next += 1
        self.write(memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))

    def close(self) -> FileDigest:
        """See DigestedFile; all announced tensors must be there."""
        assert self._next == len(self._announced), f"{len(self._announced) - self._next} tensors are missing"
        return super().close()
