"""DeepSpeed's universal checkpoints: one file per parameter and state, loaded by DeepSpeed at any number of ranks.

    DIR/latest_universal                                 names the tag
    DIR/global_step40_universal/zero/<parameter>/        fp32.pt, one file per optimizer state, step.pt
    DIR/global_step40_universal/*model_states.pt         counters of the engine
    DIR/hope/                                            what the format has no place for

Nothing of DeepSpeed is imported to write or read them. They are pickles: reading is by torch.load(weights_only=True), which
makes nothing but tensors and plain containers of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.format import MASTER
from hope_megatron.checkpoint.output import fresh_directory
from hope_megatron.checkpoint.skeleton import skeleton_of
from hope_megatron.checkpoint.unsharded import UnshardedCheckpoint, compare_unsharded
from hope_megatron.convert.deepspeed.pickles import load_tensors
from hope_megatron.convert.extras import Parameters, has_extras, read_extras, write_extras

LATEST = "latest_universal"
FP32 = "fp32"
_FORMAT_VERSION = "0.17.0"
"""DeepSpeed refuses global state without a version; this is the oldest whose reader was tried."""


def write_universal(unsharded: UnshardedCheckpoint, out_dir: Path) -> int:
    """Write a checkpoint in this format, one tensor in memory at a time, then read it back and compare every tensor.

    Returns:
        Numbers compared.

    Raises:
        ConversionError: `out_dir` is taken or cannot be written, or what was written differs; nothing is left then.
    """
    step = unsharded.description["progress"]["step"]
    tag = f"global_step{step}_universal"
    groups, group_of = unsharded.description["optimizer"]["groups"], skeleton_of(unsharded).group_of
    with fresh_directory(out_dir, has_extras) as directory:
        for parameter in unsharded.parameters.values():
            folder = directory / tag / "zero" / parameter.name
            folder.mkdir(parents=True)
            tags = parameter.tags
            cut = {"cat_dim": tags.partition_dim or 0, "param_n_sub_params": tags.partition_stride}
            for state in parameter.states:
                tensor = unsharded.read(parameter.name, state).contiguous()
                torch.save({"param": tensor, **cut}, folder / f"{FP32 if state == MASTER else state}.pt")
            if parameter.states != (MASTER,):
                torch.save(groups[group_of[parameter.name]]["step"], folder / "step.pt")
        # Learning rates and the like belong to the run that loads this, so the groups are empty.
        global_state = {"ds_version": _FORMAT_VERSION, "param_groups": [{"params": []} for _ in groups]}
        torch.save(global_state, directory / tag / "zero" / "optimizer_state.pt")
        counters = {
            "module": {},
            "dp_world_size": unsharded.layout.data_parallel,
            "mp_world_size": 1,
            "global_steps": step,
            "global_samples": unsharded.description["progress"]["samples"],
            "skipped_steps": 0,
            "lr_scheduler": None,
        }
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):  # ZeRO 1 and 2, ZeRO 3
            torch.save(counters, directory / tag / name)
        (directory / LATEST).write_text(tag)
        write_extras(directory, unsharded)
        return compare_unsharded(unsharded, read_universal(directory))


def read_universal(directory: Path) -> UnshardedCheckpoint:
    """A checkpoint that `write_universal` made; see `read_extras`."""

    def open_reader(_: Parameters) -> Callable[[str, str], Tensor]:
        zero = _zero_folder(directory)
        return lambda parameter, state: _read(zero / parameter / f"{FP32 if state == MASTER else state}.pt")

    return read_extras(directory, open_reader, "deepspeed")


def universal_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Float32 weights of a universal checkpoint by parameter name, whoever wrote it.

    Raises:
        ConversionError: the directory is of another format, or a file holds more than tensors.
    """
    for folder in sorted(path for path in _zero_folder(directory).iterdir() if path.is_dir()):
        yield folder.name, _read(folder / f"{FP32}.pt").float()


def _zero_folder(directory: Path) -> Path:
    try:
        tag = (directory / LATEST).read_text().strip()
    except OSError:
        raise ConversionError(
            f"{directory} has neither {LATEST} nor latest: no checkpoint of DeepSpeed; name the directory that was given "
            "to save_checkpoint"
        ) from None
    folder = directory / tag / "zero"
    if Path(tag).name != tag or not folder.is_dir():
        raise ConversionError(f"{directory / LATEST} names {tag!r}, which is no folder with zero/ in it")
    return folder


def _read(path: Path) -> Tensor:
    value = load_tensors(path)
    tensor = value.get("param") if isinstance(value, dict) else value
    if not isinstance(tensor, Tensor):
        raise ConversionError(f"{path} holds no tensor 'param'")
    return tensor
