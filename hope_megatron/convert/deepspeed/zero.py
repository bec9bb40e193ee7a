"""Tensors from the directory that DeepSpeed's `engine.save_checkpoint` leaves under ZeRO 1, 2 or 3.

    DIR/latest                                               names the tag
    DIR/TAG/*mp_rank_<tp>_model_states.pt                    names and shapes of the parameters
    DIR/TAG/*zero_pp_rank_<dp>_mp_rank_<tp>_optim_states.pt  float32 weights and optimizer states, cut over the dp ranks

DeepSpeed's own reader (zero_to_fp32.py) unpickles whatever it finds and knows no tensor parallelism. Here DeepSpeed is not
imported: its classes in these files become harmless ones of ours. Tensors stay on disk until their turn.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.format import MASTER
from hope_megatron.convert.deepspeed.pickles import load_tensors
from hope_megatron.convert.deepspeed.universal import LATEST as LATEST_UNIVERSAL

LATEST = "latest"
_OPTIM_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


class _Ignored:
    """Takes the attributes of what DeepSpeed keeps beside the tensors; nobody reads them."""


class _AlsoIgnored(_Ignored):
    """PyTorch's allow-list wants one class for each name."""


class _IgnoredToo(_Ignored):
    """PyTorch's allow-list wants one class for each name."""


_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}


def _stage(kind: Any, name: Any) -> int:
    """A member of ZeroStageEnum as Python 3.11.0 to 3.11.3 write it, getattr(class, name); no attribute of anything else."""
    if kind is not int or name not in _STAGES:
        raise pickle.UnpicklingError(f"it takes {name!r} of {kind!r}")
    return _STAGES[name]


_STAND_INS = (
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_stage, "builtins.getattr"),
    (_Ignored, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_AlsoIgnored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_IgnoredToo, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
)


class ZeroDirectory:
    """The files of all ranks, opened.

    Raises:
        ConversionError: files are missing, do not fit together, or hold more than tensors.
    """

    def __init__(self, directory: Path) -> None:
        files = _optim_files(directory)
        tp_size = len({tp_rank for _, tp_rank in files})
        dp_size = len(files) // tp_size
        if files.keys() != {(dp_rank, tp_rank) for dp_rank in range(dp_size) for tp_rank in range(tp_size)}:
            raise ConversionError(
                f"{directory} lacks files of some ranks; it has those of {sorted(files)} (data, tensor)"
            )
        self.directory = directory
        self._ranks = [_open_rank([files[dp_rank, tp] for dp_rank in range(dp_size)], tp) for tp in range(tp_size)]
        for rank in self._ranks[1:]:
            if rank.places.keys() != self._ranks[0].places.keys():
                others = sorted(rank.places.keys() ^ self._ranks[0].places.keys())
                raise ConversionError(f"{directory}: tensor-parallel ranks hold different parameters: {others}")

    @property
    def names(self) -> list[str]:
        """Parameters, in the order of DeepSpeed's groups."""
        return list(self._ranks[0].places)

    def shards(self, name: str, state: str = MASTER) -> list[Tensor]:
        """The float32 weights or an optimizer state of a parameter, of all tensor-parallel ranks.

        Raises:
            ConversionError: it is not there.
        """
        try:
            return [rank.read(name, state) for rank in self._ranks]
        except (KeyError, IndexError, RuntimeError) as error:
            raise ConversionError(f"{self.directory}: no {state} of {name} can be put together: {error}") from None

    def optimizer_states(self, name: str) -> tuple[str, ...]:
        """Names of the tensors that the optimizer keeps for a parameter; () before its first step."""
        return tuple(sorted(self._ranks[0].state_tensors(name)))

    def optimizer_step(self, name: str) -> int:
        """Steps that the optimizer has made on a parameter.

        Raises:
            ConversionError: ranks disagree, or the number is missing.
        """
        found = {step for rank in self._ranks for step in rank.steps(name)}
        if len(found) != 1 or (step := found.pop()) is None:
            raise ConversionError(
                f"{self.directory}: the optimizer's steps of {name} are {found or None}, not one number"
            )
        return step

    @property
    def optimizer_settings(self) -> list[Mapping[str, Any]]:
        """The optimizer's parameter groups, without their parameters."""
        return self._ranks[0].settings

    @property
    def progress(self) -> tuple[int, int]:
        """(steps, samples) that DeepSpeed's engine has counted."""
        return self._ranks[0].progress


def is_zero_checkpoint(directory: Path) -> bool:
    """Whether files of DeepSpeed's ranks lie there, and nobody made a universal checkpoint of them."""
    return (directory / LATEST).is_file() and not (directory / LATEST_UNIVERSAL).exists()


def zero_shards(directory: Path) -> Iterator[tuple[str, list[Tensor]]]:
    """(name, float32 shards of all tensor-parallel ranks) of every parameter, whoever wrote them.

    Raises:
        ConversionError: as for `ZeroDirectory`.
    """
    opened = ZeroDirectory(directory)
    for name in opened.names:
        yield name, opened.shards(name)


@dataclass(frozen=True)
class _Place:
    """Where a parameter's shard begins: in the vectors of a group laid end to end (ZeRO 1, 2), in each of them (ZeRO 3)."""

    vector: int
    offset: int
    shape: torch.Size


@dataclass(frozen=True)
class _Rank:
    """One tensor-parallel rank: the vectors of its data-parallel ranks, and what lies where in them."""

    weights: list[Sequence[Tensor]]
    states: list[Mapping[int, Mapping[str, Any]]]
    places: dict[str, _Place]
    equal_partitions: bool
    """Whether every parameter is cut into equal parts (ZeRO 3), and not the vectors."""
    settings: list[Mapping[str, Any]]
    """The optimizer's groups without parameters."""
    progress: tuple[int, int]
    """Steps and samples."""

    def read(self, name: str, state: str) -> Tensor:
        place = self.places[name]
        numel, vectors = place.shape.numel(), self._vectors(place.vector, state)
        if self.equal_partitions:
            part = -(-numel // len(vectors))
            return torch.cat([_take([vector], place.offset, part) for vector in vectors])[:numel].view(place.shape)
        return _take(vectors, place.offset, numel).view(place.shape)

    def state_tensors(self, name: str) -> set[str]:
        index = self.places[name].vector
        vectors = zip(self.states, self.weights, strict=True)
        of_ranks = [_tensors_like(states.get(index, {}), weights[index]) for states, weights in vectors]
        return set.intersection(*of_ranks)

    def steps(self, name: str) -> set[int | None]:
        index = self.places[name].vector
        found = [states.get(index, {}).get("step") for states in self.states]
        return {None if step is None else int(step) for step in found}

    def _vectors(self, index: int, state: str) -> list[Tensor]:
        if state == MASTER:
            return [weights[index] for weights in self.weights]
        return [states[index][state] for states in self.states]


def _optim_files(directory: Path) -> dict[tuple[int, int], Path]:
    """Files with the float32 weights by (dp_rank, tp_rank)."""
    tag = (directory / LATEST).read_text().strip()
    if Path(tag).name != tag or not (directory / tag).is_dir():
        raise ConversionError(f"{directory / LATEST} names {tag!r}, which is no folder beside it")
    found: dict[tuple[int, int], Path] = {}
    for path in sorted((directory / tag).iterdir()):
        if match := _OPTIM_FILE.fullmatch(path.name):
            rank = int(match[1]), int(match[2])
            if rank in found:
                raise ConversionError(f"{found[rank]} and {path.name} beside it are of one rank; keep one set of files")
            found[rank] = path
    if not found:
        raise ConversionError(
            f"{directory / tag} has no *zero_pp_rank_*_optim_states.pt: not saved under ZeRO 1, 2 or 3, or a part of it"
        )
    return found


def _open_rank(paths: Sequence[Path], tp_rank: int) -> _Rank:
    """The files of one tensor-parallel rank."""
    saved = [_section(path, "optimizer_state_dict") for path in paths]
    # DeepSpeed's wrapper for bf16 with float32 gradients under ZeRO 1 (bf16_optimizer.py:629) does not say the stage.
    stage, count = saved[0].get("zero_stage", 1), saved[0].get("partition_count")
    saved_by = max(count) if isinstance(count, list) else count
    if stage not in (1, 2, 3) or saved_by != len(paths):
        raise ConversionError(
            f"{paths[0]} is of ZeRO stage {stage} on {saved_by} data-parallel ranks, and {len(paths)} files are there"
        )
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    model_file = paths[0].with_name(f"{prefix}mp_rank_{tp_rank:02d}_model_states.pt")
    shapes = _section(model_file, "param_shapes")
    progress = _counter(model_file, "global_steps"), _counter(model_file, "global_samples")
    try:
        if stage == 3:
            weights = [rank["fp32_flat_groups"] for rank in saved]
            optimizers, places = (
                [rank["optimizer_state_dict"] for rank in saved],
                _places_in_partitions(weights, shapes),
            )
        else:
            weights = [rank["single_partition_of_fp32_groups"] for rank in saved]
            optimizers = [rank["base_optimizer_state"] for rank in saved]
            places = _places_in_vectors(weights, shapes, saved[0])
        return _Rank(
            weights, [_as_state(one) for one in optimizers], places, stage == 3, _settings(optimizers[0]), progress
        )
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ConversionError(f"{paths[0].parent}: the files do not fit together: {error}") from None


def _section(path: Path, key: str) -> Any:
    content = load_tensors(path, _STAND_INS, mmap=True)
    if not isinstance(content, dict) or key not in content:
        raise ConversionError(f"{path} has no {key!r}; DeepSpeed did not save it under ZeRO")
    return content[key]


def _counter(path: Path, key: str) -> int:
    value = _section(path, key)
    if not isinstance(value, int) or value < 0:
        raise ConversionError(f"{path}: {key} is {value!r}, not a count")
    return value


def _as_state(saved: Any) -> Mapping[int, Mapping[str, Any]]:
    """States by the vector's number; elastic checkpoints keep a list of them."""
    return saved["state"] if isinstance(saved, dict) else dict(enumerate(saved))


def _settings(saved: Any) -> list[Mapping[str, Any]]:
    if not isinstance(saved, dict):
        return []
    return [{key: value for key, value in group.items() if key != "params"} for group in saved["param_groups"]]


def _tensors_like(state: Mapping[str, Any], weights: Tensor) -> set[str]:
    """Names of the state tensors with a number for each weight: as long as these, or longer by what aligns the last rank's."""
    return {
        key
        for key, value in state.items()
        if isinstance(value, Tensor) and value.dim() and value.numel() >= weights.numel()
    }


def _places_in_vectors(
    weights: list[Sequence[Tensor]], shapes: list[dict[str, torch.Size]], saved: Mapping[str, Any]
) -> dict[str, _Place]:
    """ZeRO 1 and 2: every group is one vector of its parameters, cut over the ranks."""
    paddings = saved.get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
    places: dict[str, _Place] = {}
    for index, group in enumerate(shapes):
        offset = 0
        for (name, shape), padding in zip(group.items(), paddings[index], strict=True):
            places[name] = _Place(index, offset, shape)
            offset += shape.numel() + padding
        _check_used_up(offset, [rank[index] for rank in weights], 2 * len(weights))
    return places


def _places_in_partitions(weights: list[Sequence[Tensor]], shapes: list[dict[str, torch.Size]]) -> dict[str, _Place]:
    """ZeRO 3: every parameter is cut into equal parts; a rank's lie one after the other in vectors of several."""
    places: dict[str, _Place] = {}
    vector = offset = 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        if offset == weights[0][vector].numel():
            vector, offset = vector + 1, 0
        places[name] = _Place(vector, offset, shape)
        offset += -(-shape.numel() // len(weights))
        if offset > weights[0][vector].numel():
            raise ValueError(f"{name} ends at {offset} of a vector of {weights[0][vector].numel()} numbers")
    _check_used_up(offset, weights[0][vector:], 1)
    return places


def _take(pieces: Sequence[Tensor], start: int, numel: int) -> Tensor:
    """Elements [start, start + numel) of the pieces laid end to end."""
    found, first = [], 0
    for piece in pieces:
        low, high = max(start - first, 0), min(start + numel - first, piece.numel())
        if low < high:
            found.append(piece[low:high].float())
        first += piece.numel()
    return torch.cat(found) if found else torch.empty(0)


def _check_used_up(offset: int, pieces: Sequence[Tensor], alignment: int) -> None:
    """Nothing may be left over but what aligns the end."""
    total = sum(piece.numel() for piece in pieces)
    if not 0 <= total - offset < alignment:
        raise ValueError(f"the parameters have {offset} numbers, the vector {total}")
