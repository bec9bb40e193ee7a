"""The shard format: WebDataset tars of token arrays, with an index that makes every document one seek away.

A document is two members of the tar, ``KEY.u16`` (or ``KEY.u32``: its token ids, raw little-endian) and ``KEY.json``
(its provenance). The index beside the tar, ``NAME.idx``, is an int64 array [num_documents, 2] of
(byte offset of the tokens in the tar, number of tokens).

Reading goes by the index alone: the tar is memory-mapped, never unpacked, and its bytes are checked against the
manifest's SHA-256, and its structure with what our writer makes, before the first token is used.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_pipeline.errors import CorruptShardError, ShardError
from data_pipeline.files import atomic_file, canonical_json, close_all, sync_directory, writing
from data_pipeline.manifest import ShardInfo
from data_pipeline.structure import BLOCK, find_fault, plain_header

INDEX_DTYPE = np.dtype("<i8")
TOKEN_EXTENSIONS = {"<u2": "u16", "<u4": "u32"}


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _member(name: str, data: bytes) -> bytes:
    """One tar member."""
    return plain_header(name, len(data)) + data + b"\0" * (-len(data) % BLOCK)


# ---- writing -------------------------------------------------------------------------------------------------------


@dataclass
class OpenShard:
    """How far the unfinished shard had got when its bytes were last made safe."""

    number: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int = 0


class ShardWriter:
    """Appends documents to numbered shards of one directory, and can continue where an earlier process stopped.

    A shard grows under a hidden name and gets its own when it is sealed. `commit` makes everything so far safe and
    returns the state from which a new writer continues with the same bytes.
    """

    def __init__(
        self,
        directory: Path,
        dtype: np.dtype,
        shard_tokens: int,
        state: dict[str, Any] | None = None,
        key_prefix: str = "",
    ) -> None:
        self._key_prefix = key_prefix
        state = state or {"open": {}, "shards": []}
        self._directory = directory
        self._dtype = dtype
        self._extension = TOKEN_EXTENSIONS[dtype.str]
        self._shard_tokens = shard_tokens
        self.shards = [ShardInfo(**shard) for shard in state["shards"]]
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        self._resume(OpenShard(**state["open"]))

    def _paths(self, number: int) -> tuple[Path, Path]:
        tar = self._directory / shard_name(number)
        return tar, tar.with_suffix(".idx")

    @staticmethod
    def _hidden(path: Path) -> Path:
        return path.with_name(f".{path.name}.partial")

    def _resume(self, progress: OpenShard) -> None:
        """Cut the unfinished files back to what was committed, and take up their digests."""
        self._open = progress
        self._digests = (hashlib.sha256(), hashlib.sha256())
        sizes = (progress.bytes, progress.documents * 2 * INDEX_DTYPE.itemsize)
        self._files: list[IO[bytes]] = []
        with writing(self._directory):
            for path, size, digest in zip(self._paths(progress.number), sizes, self._digests, strict=True):
                self._files.append(self._reopen(path, size))
                while piece := self._files[-1].read(1 << 20):
                    digest.update(piece)

    def _reopen(self, path: Path, size: int) -> IO[bytes]:
        """The hidden file of a shard or its index, cut back to ``size`` bytes, at its beginning."""
        hidden = self._hidden(path)
        if size and not hidden.exists() and path.exists():
            os.replace(path, hidden)  # it was sealed after the last commit: open it again
        file = open(hidden, "r+b" if size else "w+b")  # noqa: SIM115 - closed when the shard is sealed
        if os.fstat(file.fileno()).st_size < size:
            file.close()
            raise ShardError(f"{hidden} is shorter than when it was last saved. Delete the output and start again.")
        file.truncate(size)
        return file

    def add(self, tokens: np.ndarray, provenance: dict[str, Any]) -> None:
        """Append a document.

        Args:
            tokens: [num_tokens], in the shard's dtype.
            provenance: where the document comes from; JSON values.
        """
        if self._open.documents and self._open.tokens + len(tokens) > self._shard_tokens:
            self.seal()
        progress = self._open
        key = f"{self._key_prefix}{progress.number:06d}_{progress.documents:08d}"
        data = _member(f"{key}.{self._extension}", tokens.tobytes()) + _member(
            f"{key}.json", canonical_json(provenance)
        )
        entry = np.array([progress.bytes + BLOCK, len(tokens)], dtype=INDEX_DTYPE).tobytes()
        self._write(data, entry)
        progress.documents += 1
        progress.tokens += len(tokens)

    def _write(self, data: bytes, entry: bytes) -> None:
        for file, digest, piece in zip(self._files, self._digests, (data, entry), strict=True):
            with writing(self._directory):
                file.write(piece)
            digest.update(piece)
        self._open.bytes += len(data)

    @property
    def documents(self) -> int:
        return self._open.documents + sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return self._open.tokens + sum(shard.tokens for shard in self.shards)

    def seal(self) -> None:
        self._write(b"\0" * (2 * BLOCK), b"")  # the end mark of a tar
        progress = self._open
        paths = self._paths(progress.number)
        with writing(self._directory):
            self._sync()
            for file, path in zip(self._files, paths, strict=True):
                file.close()
                os.replace(self._hidden(path), path)
            sync_directory(self._directory)
        tar_digest, index_digest = (digest.hexdigest() for digest in self._digests)
        info = ShardInfo(paths[0].name, progress.bytes, progress.documents, progress.tokens, tar_digest, index_digest)
        self.shards.append(info)
        self._resume(OpenShard(number=progress.number + 1))

    def adopt(self, path: Path, info: ShardInfo) -> None:
        """Take a finished shard of another directory as the next one, without reading it: a hard link, or a copy."""
        if self._open.documents:
            self.seal()
        targets = self._paths(self._open.number)
        with writing(self._directory):
            for source, target in zip((path, path.with_suffix(".idx")), targets, strict=True):
                target.unlink(missing_ok=True)
                try:
                    os.link(source, target)
                except OSError:  # another file system, or one without links
                    with atomic_file(target) as file, open(source, "rb") as original:
                        shutil.copyfileobj(original, file)
        self.shards.append(replace(info, name=targets[0].name))
        self.close()
        for target in targets:
            self._hidden(target).unlink(missing_ok=True)
        self._resume(OpenShard(number=self._open.number + 1))

    def _sync(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def commit(self) -> dict[str, Any]:
        """Make all documents so far safe. Returns the state to continue from, as JSON values."""
        with writing(self._directory):
            self._sync()
        return {"open": dict(vars(self._open)), "shards": [dict(vars(shard)) for shard in self.shards]}

    def finish(self) -> tuple[ShardInfo, ...]:
        """Seal the last shard and return all of them."""
        if self._open.documents:
            self.seal()
        self.close()
        with writing(self._directory):
            for path in self._paths(self._open.number):
                self._hidden(path).unlink(missing_ok=True)
        return tuple(self.shards)

    def close(self) -> None:
        close_all(self._files)


# ---- reading -------------------------------------------------------------------------------------------------------


class ShardReader:
    """A verified, memory-mapped shard.

    Args:
        path: of the tar; its index lies beside it.
        info: what the manifest says of it.
        dtype: of its tokens.
        verify: compare the digests with the manifest's, and check the structure. What the provenance of a document says
            is not looked at before it is asked for.

    Attributes:
        ends: int64 [num_documents]; running total of tokens with one end mark per document.
        starts: int64 [num_documents]; the element of ``tokens`` where each document begins.
        offsets: int64 [num_documents]; the byte of the tar where each document begins.
        lengths: int64 [num_documents]; tokens per document, without end mark.
        tokens: the whole tar seen as an array of token ids; only index it through ``starts``.
    """

    def __init__(self, path: str | Path, info: ShardInfo, dtype: np.dtype, *, verify: bool = True) -> None:
        self.path = Path(path)
        self.info = info
        buffer = self._map(verify)
        index = self._read_index(verify)
        offsets, self.lengths = index[:, 0], index[:, 1]
        self._check_index(buffer, offsets, dtype)
        if verify and (
            fault := find_fault(buffer, offsets, self.lengths * dtype.itemsize, TOKEN_EXTENSIONS[dtype.str])
        ):
            raise self._fail(fault)
        self.starts = offsets // dtype.itemsize
        self.ends = np.cumsum(self.lengths + 1)
        self.tokens = np.frombuffer(buffer, dtype=dtype)
        self.offsets = offsets
        self.buffer = buffer

    def _fail(self, what: str, kind: type[ShardError] = CorruptShardError) -> ShardError:
        return kind(
            f"shard {self.path} {what}. Restore the file, or prepare the data again; 'hope data verify' checks all."
        )

    def _map(self, verify: bool) -> mmap.mmap:
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != self.info.bytes:
                    raise self._fail(f"has {size} bytes where the manifest says {self.info.bytes}")
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise self._fail(f"cannot be read ({error})", ShardError) from error
        if verify and (found := hashlib.sha256(buffer).hexdigest()) != self.info.sha256:
            raise self._fail(f"has changed: its SHA-256 is {found}, not the manifest's {self.info.sha256}")
        return buffer

    def _read_index(self, verify: bool) -> np.ndarray:
        path = self.path.with_suffix(".idx")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise self._fail(f"has no readable index {path.name} ({error.strerror})", ShardError) from error
        if len(data) != self.info.documents * 2 * INDEX_DTYPE.itemsize:
            raise self._fail(f"has an index {path.name} of another length than its {self.info.documents} documents")
        if verify and hashlib.sha256(data).hexdigest() != self.info.index_sha256:
            raise self._fail(f"has an index {path.name} whose SHA-256 is not the manifest's")
        return np.frombuffer(data, dtype=INDEX_DTYPE).reshape(-1, 2)

    def _check_index(self, buffer: mmap.mmap, offsets: np.ndarray, dtype: np.dtype) -> None:
        """Every entry must lie within the file, behind room for a header, in order."""
        sizes = self.lengths * dtype.itemsize
        stops = offsets + sizes
        sound = (
            ((self.lengths >= 0) & (self.lengths <= len(buffer))).all()  # also keeps the sums below from overflowing
            and (offsets % BLOCK == 0).all()
            and offsets[0] == BLOCK
            and (offsets[1:] >= stops[:-1] + BLOCK).all()
            and stops[-1] <= len(buffer)
            and self.lengths.sum() == self.info.tokens
            and len(buffer) % dtype.itemsize == 0
        )
        if not sound:
            raise self._fail("has an index that does not describe it")

    def document(self, number: int) -> np.ndarray:
        """Token ids of a document, [num_tokens], without its end mark; a view into the file."""
        start = self.starts[number]
        return self.tokens[start : start + self.lengths[number]]

    def provenance(self, number: int) -> dict[str, Any]:
        """Where a document comes from."""
        size = int(self.lengths[number]) * self.tokens.itemsize
        header = int(self.offsets[number]) + size + (-size % BLOCK)
        try:
            member = tarfile.TarInfo.frombuf(self.buffer[header : header + BLOCK], "utf-8", "strict")
            value = json.loads(self.buffer[header + BLOCK : header + BLOCK + member.size])
        except (tarfile.HeaderError, ValueError, RecursionError) as error:
            raise self._fail(f"has no provenance for document {number} ({error})") from error
        if not member.name.endswith(".json") or not isinstance(value, dict):
            raise self._fail(f"has no provenance for document {number}")
        return value

    def documents(self) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """All documents with their provenance, in order."""
        for number in range(self.info.documents):
            yield self.document(number), self.provenance(number)
