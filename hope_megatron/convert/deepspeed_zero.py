"""Weights from the directory that DeepSpeed's `engine.save_checkpoint` leaves under ZeRO 1, 2 or 3.

    DIR/latest                                              names the tag
    DIR/TAG/*mp_rank_<tp>_model_states.pt                   names and shapes of the parameters
    DIR/TAG/*zero_pp_rank_<dp>_mp_rank_<tp>_optim_states.pt float32 weights, cut over the data-parallel ranks

DeepSpeed's own reader (zero_to_fp32.py) unpickles whatever it finds and knows no tensor parallelism. Here DeepSpeed is not
imported: its classes in these files become harmless ones of ours. Tensors stay on disk until their turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hope_megatron.convert.deepspeed_universal import LATEST as LATEST_UNIVERSAL
from hope_megatron.convert.errors import ConversionError
from hope_megatron.convert.pickles import load_tensors

LATEST = "latest"
_OPTIM_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


class _Ignored:
    """Takes the attributes of what DeepSpeed keeps beside the tensors; nobody reads them."""


class _AlsoIgnored(_Ignored):
    """PyTorch's allow-list wants one class for each name."""


class _IgnoredToo(_Ignored):
    """PyTorch's allow-list wants one class for each name."""


_STAND_INS = (
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Ignored, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_AlsoIgnored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_IgnoredToo, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
)


def is_zero_checkpoint(directory: Path) -> bool:
    """Whether DeepSpeed itself saved something there, and nobody made a universal checkpoint of it."""
    return (directory / LATEST).is_file() and not (directory / LATEST_UNIVERSAL).exists()


def zero_shards(directory: Path) -> Iterator[tuple[str, list[Tensor]]]:
    """(name, float32 shards of all tensor-parallel ranks) of every parameter, in the order of DeepSpeed's groups.

    Raises:
        ConversionError: files are missing, do not fit together, or hold more than tensors.
    """
    files = _optim_files(directory)
    tp_size = len({tp_rank for _, tp_rank in files})
    dp_size = len(files) // tp_size
    if files.keys() != {(dp_rank, tp_rank) for dp_rank in range(dp_size) for tp_rank in range(tp_size)}:
        raise ConversionError(f"{directory} lacks files of some ranks; it has those of {sorted(files)} (data, tensor)")
    ranks = [_tp_rank_weights([files[dp_rank, tp] for dp_rank in range(dp_size)], tp) for tp in range(tp_size)]
    for entries in zip(*ranks, strict=True):
        names = {name for name, _ in entries}
        if len(names) > 1:
            raise ConversionError(f"{directory}: tensor-parallel ranks hold different parameters: {sorted(names)}")
        yield names.pop(), [tensor for _, tensor in entries]


def _optim_files(directory: Path) -> dict[tuple[int, int], Path]:
    """Files with the float32 weights by (dp_rank, tp_rank)."""
    tag = (directory / LATEST).read_text().strip()
    if Path(tag).name != tag or not (directory / tag).is_dir():
        raise ConversionError(f"{directory / LATEST} names {tag!r}, which is no folder beside it")
    found = {}
    for path in (directory / tag).iterdir():
        if match := _OPTIM_FILE.fullmatch(path.name):
            found[int(match[1]), int(match[2])] = path
    if not found:
        raise ConversionError(
            f"{directory / tag} has no *zero_pp_rank_*_optim_states.pt: not saved under ZeRO 1, 2 or 3, or a part of it"
        )
    return found


def _tp_rank_weights(paths: Sequence[Path], tp_rank: int) -> Iterator[tuple[str, Tensor]]:
    """Names and shards of one tensor-parallel rank from the files of its data-parallel ranks."""
    states = [_section(path, "optimizer_state_dict") for path in paths]
    stage, count = states[0].get("zero_stage"), states[0].get("partition_count")
    saved_by = max(count) if isinstance(count, list) else count
    if stage not in (1, 2, 3) or saved_by != len(paths):
        raise ConversionError(
            f"{paths[0]} is of ZeRO stage {stage} on {saved_by} data-parallel ranks, and {len(paths)} files are there"
        )
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    shapes = _section(paths[0].with_name(f"{prefix}mp_rank_{tp_rank:02d}_model_states.pt"), "param_shapes")
    read = _equal_partitions if stage == 3 else _flat_vectors
    try:
        yield from read(states, shapes)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise ConversionError(f"{paths[0].parent}: the files do not fit together: {error}") from None


def _section(path: Path, key: str) -> Any:
    content = load_tensors(path, _STAND_INS, mmap=True)
    if not isinstance(content, dict) or key not in content:
        raise ConversionError(f"{path} has no {key!r}; DeepSpeed did not save it under ZeRO")
    return content[key]


def _flat_vectors(states: list[dict[str, Any]], shapes: list[dict[str, torch.Size]]) -> Iterator[tuple[str, Tensor]]:
    """ZeRO 1 and 2: every group is one vector of its parameters, cut over the ranks."""
    paddings = states[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
    for index, group in enumerate(shapes):
        vector, offset = [state["single_partition_of_fp32_groups"][index] for state in states], 0
        for (name, shape), padding in zip(group.items(), paddings[index], strict=True):
            yield name, _take(vector, offset, shape.numel()).view(shape)
            offset += shape.numel() + padding
        _check_used_up(offset, vector, 2 * len(states))


def _equal_partitions(
    states: list[dict[str, Any]], shapes: list[dict[str, torch.Size]]
) -> Iterator[tuple[str, Tensor]]:
    """ZeRO 3: every parameter is cut into equal parts; a rank's lie one after the other, in sub-groups of any size."""
    vectors, offset = [state["fp32_flat_groups"] for state in states], 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        numel = -(-shape.numel() // len(states))
        whole = torch.cat([_take(vector, offset, numel) for vector in vectors])
        yield name, whole[: shape.numel()].view(shape)
        offset += numel
    _check_used_up(offset, vectors[0], 1)


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
