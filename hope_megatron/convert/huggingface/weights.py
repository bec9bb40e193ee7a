"""Weights as Hugging Face stores them: safetensors files of bounded size, and an index when there are several."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hope_megatron.checkpoint.errors import ConversionError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 << 30


def write_weights(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> int:
    """Write tensors into `directory`, which must be fresh, holding at most one shard in memory.

    Args:
        directory: where the files go.
        tensors: names and full tensors; a tensor larger than a shard gets a file of its own.
        max_shard_bytes: size at which a new file is begun.

    Returns:
        Total bytes of the tensors.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0
    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            shards.append(_write_shard(directory, len(shards), pending))
            pending, pending_bytes = {}, 0
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    shards.append(_write_shard(directory, len(shards), pending))
    _name_shards(directory, shards, total_bytes)
    return total_bytes


def read_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of `write_weights`' files or any other model in the same layout, one at a time.

    Raises:
        ConversionError: a file is missing or not whole, or the index names a tensor that its file lacks.
    """
    for path, names in _files(directory).items():
        yield from _read_shard(path, names)


def _write_shard(directory: Path, number: int, tensors: Mapping[str, Tensor]) -> list[str]:
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, directory / f"{number}.part", metadata={"format": "pt"})
    return list(tensors)


def _name_shards(directory: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Give the files their final names, which hold how many there are, and write the index."""
    if len(shards) == 1:
        (directory / "0.part").rename(directory / SINGLE_NAME)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{number}.part").rename(directory / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _files(directory: Path) -> dict[Path, list[str] | None]:
    """The weight files, each with the tensors the index expects in it (None: there is no index)."""
    if not (directory / INDEX_NAME).exists():
        return {directory / SINGLE_NAME: None}
    index = read_json(directory / INDEX_NAME)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConversionError(
            f"{directory / INDEX_NAME} has no weight_map of tensor names to files; export the model again"
        )
    files: dict[Path, list[str] | None] = {}
    for tensor, name in weight_map.items():
        if Path(name).name != name:
            raise ConversionError(
                f"{directory / INDEX_NAME} places {tensor} in {name!r}, which is not a plain file name"
            )
        names = files.setdefault(directory / name, [])
        assert names is not None
        names.append(tensor)
    return files


def _read_shard(path: Path, names: list[str] | None) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ConversionError(f"{path} is missing; export or download the model again")
    try:
        with safe_open(path, framework="pt") as file:
            found = list(file.keys())
            for name in found if names is None else names:
                if name not in found:
                    raise ConversionError(f"{path} lacks the tensor {name}, which the index places there")
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ConversionError(
            f"{path} is not a whole safetensors file: {error}; export or download the model again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a named error."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value
