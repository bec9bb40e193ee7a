"""Megatron-Core's distributed checkpoints (`torch_dist`): PyTorch's distributed checkpoint files with Megatron-Core's names.

Weights are stored under their parameter names, which are the keys of `LanguageModel.sharded_state_dict()`; optimizer
states as `optimizer.state.<state>.<parameter>`, as Megatron-Core's distributed optimizer names its own. Tensors are whole:
either library's loader cuts what a rank needs. What these files have no place for lies in `hope/`.
"""

from __future__ import annotations

import enum
import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.checkpoint.format import MASTER
from hope_megatron.checkpoint.local_model import build_local_model
from hope_megatron.checkpoint.output import fresh_directory
from hope_megatron.checkpoint.unsharded import UnshardedCheckpoint, compare_unsharded, read_unsharded
from hope_megatron.config import RunConfig
from hope_megatron.convert.extras import Parameters, has_extras, read_extras, write_extras
from hope_megatron.convert.formats import ExportOptions, Format
from hope_megatron.model import LanguageModel

_METADATA = ".metadata"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def key_of(parameter: str, state: str) -> str:
    """The name of a tensor in these files."""
    return parameter if state == MASTER else f"optimizer.state.{state}.{parameter}"


def write_torch_dist(unsharded: UnshardedCheckpoint, out_dir: Path) -> int:
    """Write a checkpoint in this format, one tensor in memory at a time, then read it back and compare every tensor.

    Returns:
        Numbers compared.

    Raises:
        ConversionError: `out_dir` is taken or cannot be written, or what was written differs; nothing is left then.
    """
    names = {key_of(p.name, state): (p.name, state) for p in unsharded.parameters.values() for state in p.states}
    shapes = {key: torch.empty(unsharded.parameters[name].shape, device="meta") for key, (name, _) in names.items()}
    with fresh_directory(out_dir, has_extras) as directory:
        writer = dcp.FileSystemWriter(directory, sync_files=False)
        with _quiet(), _plain_errors():
            dcp.save(shapes, storage_writer=writer, planner=_OneByOne(unsharded, names), no_dist=True)
        (directory / "metadata.json").write_text(json.dumps(_BACKEND) + "\n")
        # What Megatron-Core calls the common state: plain numbers that its loader returns beside the tensors.
        torch.save({"iteration": unsharded.description["progress"]["step"]}, directory / "common.pt")
        write_extras(directory, unsharded)
        return compare_unsharded(unsharded, read_torch_dist(directory))


def read_torch_dist(directory: Path) -> UnshardedCheckpoint:
    """A checkpoint that `write_torch_dist` made; see `read_extras`."""

    def open_reader(_: Parameters) -> Callable[[str, str], Tensor]:
        reader = _open(directory)
        return lambda parameter, state: _read(reader, key_of(parameter, state))

    return read_extras(directory, open_reader, "torch_dist")


def torch_dist_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Weights by parameter name, whoever wrote them; optimizer states and whatever is no tensor are passed over.

    Raises:
        ConversionError: the directory is of another format.
    """
    reader = _open(directory)
    for key, entry in reader.read_metadata().state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer."):
            yield key, _read(reader, key)


class _OneByOne(DefaultSavePlanner):
    """Plans with shapes alone; a tensor is read when its turn to be written has come."""

    def __init__(self, unsharded: UnshardedCheckpoint, names: dict[str, tuple[str, str]]) -> None:
        super().__init__(flatten_state_dict=False)
        self._unsharded, self._names = unsharded, names

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._unsharded.read(*self._names[index.fqn]).contiguous()


class _MetadataUnpickler(pickle.Unpickler):
    """`.metadata` is a pickle: only the classes that describe tensors may come out of it, none of which does anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _DESCRIBING:
            return _DESCRIBING[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 write a member of an enumeration
            return _enum_member
        raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")


def _enum_member(kind: Any, name: Any) -> Any:
    """A member of an enumeration, and no attribute of anything else."""
    if not (isinstance(kind, enum.EnumMeta) and name in kind.__members__):
        raise pickle.UnpicklingError(f"it takes {name!r} of {kind!r}, which is no member of an enumeration")
    return kind[name]


_DESCRIBING: dict[tuple[str, str], Any] = {
    **{
        (dcp.metadata.__name__, name): getattr(dcp.metadata, name)
        for name in (*dcp.metadata.__all__, "_MEM_FORMAT_ENCODING")
    },
    **{  # Megatron-Core keeps the plans of all ranks there
        (dcp.planner.__name__, name): getattr(dcp.planner, name)
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
    },
    (dcp.filesystem.__name__, "_StorageInfo"): dcp.filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}


class _Reader(dcp.FileSystemReader):
    """PyTorch's reader; it loads tensors with weights_only=True itself."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            with open(Path(self.path) / _METADATA, "rb") as file:
                self._metadata = _MetadataUnpickler(file).load()
        return self._metadata


def _open(directory: Path) -> _Reader:
    reader = _Reader(directory)
    try:
        reader.read_metadata()
    except OSError as error:
        raise ConversionError(
            f"{directory} is no torch_dist checkpoint: cannot read {_METADATA}: {error.strerror}"
        ) from None
    except Exception as error:  # a pickle can fail in any way
        raise ConversionError(f"{directory / _METADATA} is refused, nothing was executed: {error}") from None
    return reader


def _read(reader: _Reader, key: str) -> Tensor:
    entry = reader.read_metadata().state_dict_metadata.get(key)
    if not isinstance(entry, TensorStorageMetadata):
        raise ConversionError(f"{reader.path} lacks the tensor {key}; it is of another model")
    target = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
    with _quiet():
        dcp.load(target, storage_reader=reader, no_dist=True)
    return target[key]


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What went wrong, in place of PyTorch's report of it, which is no `Exception` and so goes past everything that tidies up."""
    try:
        yield
    except dcp.api.CheckpointException as report:
        raise next(iter(report.failures.values()))[0] from None


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch warns that there is no process group, which is what was asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _export(source: CheckpointSource, directory: Path, options: ExportOptions) -> list[str]:
    unsharded = read_unsharded(source).with_history("export to torch_dist")
    num_elements = write_torch_dist(unsharded, directory)
    return [
        f"{directory}: torch_dist, of {unsharded.origin}",
        f"checked: {num_elements:,} numbers read back, all equal",
    ]


def _load_model(directory: Path, config: RunConfig) -> LanguageModel:
    return build_local_model(config.model, torch_dist_weights(directory), source=str(directory))


FORMAT = Format(export=_export, restore=read_torch_dist, load_model=_load_model)
