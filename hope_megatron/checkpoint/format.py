"""The files of a checkpoint, and how to read them: no process groups, no pickle.

    step-00000100/
      rank-00000.safetensors ...   the pieces that each rank owns, and its random generators
      checkpoint.json              what the pieces are: parameters, layout, progress, configuration, provenance
      manifest.json                SHA-256 and size of every other file, written last

A *piece* is a run of consecutive elements of one flattened tensor-parallel shard. Its tensors are named
`<state>/<parameter>`, where the state is `master` (the fp32 weights) or one of the optimizer's. Whatever the number of
data-parallel ranks and the ZeRO stage that wrote them, the pieces of a shard put in order make the shard, and the shards
of all tensor-parallel ranks make the canonical tensor.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hope_megatron.checkpoint.digested_file import DigestedFile, FileDigest, SafetensorsFile
from hope_megatron.config.matrices.geometry import full_shape
from hope_megatron.optim.geometry import merge_shards, split_shards
from hope_megatron.optim.tags import ParamTags
from hope_megatron.runtime.files import sync_directory

FORMAT = "hope-checkpoint-v1"
MANIFEST = "manifest.json"
PROBE_NAME = "probe.safetensors"
GENERATOR_PREFIX = "generator/"
DESCRIPTION = "checkpoint.json"
MASTER = "master"
STEP_PREFIX = "step-"


log = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint cannot be written, or cannot be used."""

    is_user_error = True


class CheckpointDamagedError(CheckpointError):
    """A file of a checkpoint is missing or differs from its digest."""


@dataclass(frozen=True)
class ShardFile:
    """`numel` elements from `offset` of the flattened shard that `tp_rank` has of a parameter."""

    file: str
    """Name in the directory of the checkpoint."""
    parameter: str
    tp_rank: int
    offset: int
    numel: int
    states: tuple[str, ...]
    """What the file holds of it: `master`, then the optimizer's states."""


@dataclass(frozen=True)
class ParameterRecord:
    """A parameter as the layout that wrote it saw it."""

    name: str
    """As the model names it."""
    shard_shape: tuple[int, ...]
    """On one tensor-parallel rank."""
    dtype: str
    """Compute dtype; the master weights are fp32."""
    tags: ParamTags

    def full_shape(self, tp_size: int) -> tuple[int, ...]:
        """Shape of the canonical tensor, written by `tp_size` tensor-parallel ranks."""
        return full_shape(self.shard_shape, self.tags, tp_size)


def step_directory_name(step: int) -> str:
    """`step-00000100`: sorts by step."""
    return f"{STEP_PREFIX}{step:08d}"


def rank_file_name(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


# -- writing -----------------------------------------------------------------------------------------------------


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> FileDigest:
    """Write host tensors in the safetensors format, flushed to disk, and digest the bytes on their way out."""
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsFile(path, entries, metadata) as file:
        for name, tensor in tensors.items():
            file.append(name, tensor)
    return file.close()


def write_json(path: Path, value: Any) -> FileDigest:
    """Write JSON, flushed to disk."""
    with DigestedFile(path) as file:
        file.write((json.dumps(value, indent=1, sort_keys=True) + "\n").encode())
    return file.close()


def write_manifest(directory: Path, files: Mapping[str, FileDigest]) -> None:
    """Seal a checkpoint directory: without a manifest it does not exist."""
    entries = {name: {"sha256": digest.sha256, "size": digest.size} for name, digest in sorted(files.items())}
    write_json(directory / MANIFEST, {"format": FORMAT, "files": entries})
    sync_directory(directory)


# -- reading -----------------------------------------------------------------------------------------------------


def list_checkpoints(directory: Path) -> list[Path]:
    """Step directories of a `checkpoints/` directory, newest first, sealed or not. Temporary ones are not listed."""
    steps = (
        path for path in directory.glob(f"{STEP_PREFIX}*") if path.name[len(STEP_PREFIX) :].isdigit() and path.is_dir()
    )
    return sorted(steps, key=checkpoint_step, reverse=True)


def checkpoint_step(path: Path) -> int:
    """Step of a checkpoint directory, from its name."""
    return int(path.name[len(STEP_PREFIX) :])


class Checkpoint:
    """A checkpoint directory, opened for reading. Opening reads the manifest only; `verify` digests the files."""

    def __init__(self, path: Path | str) -> None:
        """Open a step directory.

        Raises:
            CheckpointDamagedError: if it has no whole manifest.
        """
        self.path = Path(path)
        self.digests = _parse_manifest(self._read(MANIFEST), self.path / MANIFEST)
        self._verified: set[str] = set()
        self._open_files: dict[str, Any] = {}

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compare files with the manifest, all of them or those named; each once. What is not in the manifest is never read,
        but named.

        Raises:
            CheckpointDamagedError: naming the first file that is missing or differs.
        """
        if names is None:
            self.warn_of_foreign_files()
        for name in self.digests if names is None else names:
            if name not in self._verified:
                self._verify_file(name, self.digests[name])
                self._verified.add(name)

    def foreign_files(self) -> list[str]:
        """Files in the directory that the manifest does not know."""
        return foreign_files(self.path, {MANIFEST, *self.digests})

    def warn_of_foreign_files(self) -> None:
        """Name them in the log: somebody has put them there, and nobody may take them for a part of the checkpoint."""
        for name in self.foreign_files():
            log.warning("%s is not in the manifest: it is no part of the checkpoint and is not read", self.path / name)

    def _verify_file(self, name: str, expected: FileDigest) -> None:
        path = self.path / name
        digest, size = hashlib.sha256(), 0
        try:
            if not path.is_file():
                raise CheckpointDamagedError(f"{path} is missing")
            if path.stat().st_size != expected.size:
                found = path.stat().st_size
                raise CheckpointDamagedError(f"{path} has {found} bytes, its manifest says {expected.size}")
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    size += len(block)
        except OSError as error:
            raise CheckpointDamagedError(f"{path} cannot be read: {error.strerror}") from None
        self._compare(path, FileDigest(digest.hexdigest(), size), expected)

    @staticmethod
    def _compare(path: Path, found: FileDigest, expected: FileDigest) -> None:
        if found != expected:
            raise CheckpointDamagedError(f"{path} is corrupt: its SHA-256 is not the one in the manifest")

    @cached_property
    def description(self) -> dict[str, Any]:
        """The content of checkpoint.json, whose digest is verified as it is read."""
        path, data = self.path / DESCRIPTION, self._read(DESCRIPTION)
        self._compare(path, FileDigest(hashlib.sha256(data).hexdigest(), len(data)), self.digests[DESCRIPTION])
        return _parse_object(data, path)

    @cached_property
    def parameters(self) -> dict[str, ParameterRecord]:
        """Parameters by name, in the model's order."""
        with self._well_described():
            return {
                entry["name"]: ParameterRecord(
                    entry["name"], tuple(entry["shard_shape"]), entry["dtype"], ParamTags.from_dict(entry["tags"])
                )
                for entry in self.description["parameters"]
            }

    @cached_property
    def _shard_files(self) -> dict[tuple[str, int], list[ShardFile]]:
        """Pieces of each (parameter, tp_rank)."""
        found: dict[tuple[str, int], list[ShardFile]] = {}
        with self._well_described():
            for entry in self.description["files"]:
                for name, offset, numel, states in entry["pieces"]:
                    piece = ShardFile(entry["file"], name, entry["tp_rank"], offset, numel, tuple(states))
                    found.setdefault((name, entry["tp_rank"]), []).append(piece)
        return found

    def check_description(self) -> None:
        """See that checkpoint.json is whole, and that the manifest knows every file it speaks of.

        Raises:
            CheckpointDamagedError: naming what is missing.
        """
        with self._well_described():
            missing = {entry["file"] for entry in self.description["files"]} - self.digests.keys()
        if missing:
            raise CheckpointDamagedError(
                f"{self.path / MANIFEST} does not list {min(missing)}, which {DESCRIPTION} names"
            )
        assert self.parameters is not None and self._shard_files is not None  # reading them is the check

    @contextmanager
    def _well_described(self) -> Iterator[None]:
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointDamagedError(
                f"{self.path / DESCRIPTION} does not describe a checkpoint ({type(error).__name__}: {error})"
            ) from None

    @property
    def step(self) -> int:
        """Optimizer steps behind this checkpoint."""
        with self._well_described():
            return int(self.description["progress"]["step"])

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration of the run that wrote it."""
        with self._well_described():
            return self.description["config"]

    @property
    def tp_size(self) -> int:
        """Tensor-parallel ranks that wrote it."""
        with self._well_described():
            return int(self.description["layout"]["tensor_parallel"])

    def states(self, parameter: str) -> tuple[str, ...]:
        """States stored for a parameter: `master` and the optimizer's."""
        return self._shard_files[parameter, 0][0].states

    def shard_range(self, parameter: str, state: str, tp_rank: int, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened shard as it was written.

        Raises:
            CheckpointDamagedError: if the pieces do not cover the range.
        """
        out: Tensor | None = None
        covered = 0
        for piece in self._shard_files[parameter, tp_rank]:
            low, high = max(start, piece.offset), min(start + numel, piece.offset + piece.numel)
            if low >= high:
                continue
            data = self.tensor(piece.file, f"{state}/{parameter}")[low - piece.offset : high - piece.offset]
            if out is None:
                out = torch.empty(numel, dtype=data.dtype)
            out[low - start : high - start] = data
            covered += high - low
        if out is None or covered != numel:
            raise CheckpointDamagedError(
                f"{self.path}: pieces of {state}/{parameter} on tensor-parallel rank {tp_rank} hold {covered} of the "
                f"{numel} elements from {start}"
            )
        return out

    def full_tensor(self, parameter: str, state: str = MASTER) -> Tensor:
        """The canonical tensor, put together from the shards of all tensor-parallel ranks."""
        record = self.parameters[parameter]
        numel = torch.Size(record.shard_shape).numel()
        ranks = range(self.tp_size) if record.tags.partition_dim is not None else range(1)
        shards = [self.shard_range(parameter, state, rank, 0, numel).view(record.shard_shape) for rank in ranks]
        return merge_shards(shards, record.tags)

    def reshard_range(self, parameter: str, state: str, tp_size: int, tp_rank: int, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened shard that `tp_rank` of `tp_size` has, whatever layout wrote it."""
        record = self.parameters[parameter]
        if record.tags.partition_dim is None:
            return self.shard_range(parameter, state, tp_rank if tp_rank < self.tp_size else 0, start, numel)
        if tp_size == self.tp_size:
            return self.shard_range(parameter, state, tp_rank, start, numel)
        shard = split_shards(self.full_tensor(parameter, state), record.tags, tp_size)[tp_rank]
        return shard.reshape(-1)[start : start + numel].clone()

    def tensor(self, file: str, key: str) -> Tensor:
        """One tensor of one file."""
        with self._readable(file):
            if file not in self._open_files:
                self._open_files[file] = safe_open(str(self.path / file), framework="pt", device="cpu")
            return self._open_files[file].get_tensor(key)

    def rank_tensors(self, rank: int, prefix: str) -> dict[str, Tensor]:
        """Tensors of a rank's file whose names start with `prefix`, without it. Empty if that rank wrote none."""
        file = rank_file_name(rank)
        if file not in self.digests:
            return {}
        with self._readable(file), safe_open(str(self.path / file), framework="pt", device="cpu") as opened:
            names = [key for key in opened.keys() if key.startswith(prefix)]  # noqa: SIM118 (not a mapping)
            return {key[len(prefix) :]: opened.get_tensor(key) for key in names}

    @contextmanager
    def _readable(self, file: str) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise CheckpointDamagedError(f"{self.path / file} cannot be read: {error}") from None

    def _read(self, name: str) -> bytes:
        path = self.path / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise CheckpointDamagedError(f"{path} is missing: not a complete checkpoint") from None
        except OSError as error:
            raise CheckpointDamagedError(f"{path} cannot be read: {error.strerror}") from None


def _parse_object(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamagedError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointDamagedError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _parse_manifest(data: bytes, path: Path) -> dict[str, FileDigest]:
    """The table of a manifest. It must know the description, and name nothing outside of its directory."""
    manifest = _parse_object(data, path)
    if manifest.get("format") != FORMAT:
        raise CheckpointDamagedError(f"{path}: format {manifest.get('format')!r} is not {FORMAT!r}")
    files = manifest.get("files")
    if not isinstance(files, dict) or DESCRIPTION not in files:
        raise CheckpointDamagedError(f"{path} does not list {DESCRIPTION}: it is not the manifest that was written")
    digests = {}
    for name, entry in files.items():
        known = isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
        if not known or Path(name).name != name:
            raise CheckpointDamagedError(f"{path}: the entry of {name!r} is not a digest and size of a file beside it")
        digests[name] = FileDigest(entry["sha256"], entry["size"])
    return digests


def foreign_files(directory: Path, known: Collection[str]) -> list[str]:
    """Paths of files below a directory, relative to it, that are not among those known."""
    paths = (path for path in directory.rglob("*") if not path.is_dir())
    return sorted(name for path in paths if (name := str(path.relative_to(directory))) not in known)


def read_full_tensors(checkpoint_dir: Path | str | Checkpoint, state: str = MASTER) -> Iterator[tuple[str, Tensor]]:
    """Canonical tensors of a checkpoint, verified first, one after the other in the model's order.

    Args:
        checkpoint_dir: a step directory, or a checkpoint that is open; its files are verified once.
        state: `master`, or an optimizer state; parameters without that state are left out.
    """
    checkpoint = checkpoint_dir if isinstance(checkpoint_dir, Checkpoint) else Checkpoint(checkpoint_dir)
    checkpoint.verify()
    checkpoint.check_description()
    for name in checkpoint.parameters:
        if state in checkpoint.states(name):
            yield name, checkpoint.full_tensor(name, state)
