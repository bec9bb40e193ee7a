"""The files of another library as the starting point of a run: its weights at step 0, or all that it says where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.format import list_checkpoints, step_directory_name
from hope_megatron.checkpoint.reshard import write_checkpoint
from hope_megatron.checkpoint.unsharded import UnshardedCheckpoint
from hope_megatron.config import RunConfig
from hope_megatron.convert.formats import open_format
from hope_megatron.convert.untrained import untrained_checkpoint


def begin_run(source: Path, format_name: str, config: RunConfig, beginning: Mapping[str, Any]) -> Path:
    """Write RUN/checkpoints/step-00000000, from which `hope train` then starts, in any parallel layout.

    Args:
        source: a directory in a format whose weights can be read.
        format_name: one of convert/formats.py.
        config: the run that is to start from it; its model must be the one that `source` holds.
        beginning: what training writes into a checkpoint, before the first step: `progress`, `data`, `provenance`.

    Returns:
        The checkpoint.

    Raises:
        ConversionError: the architectures differ, or the run has checkpoints already.
    """
    _check_new(config)
    load_model = open_format(format_name).load_model
    if load_model is None:
        raise ConversionError(
            f"a run cannot be started from the format {format_name}; `hope list formats` names the others"
        )
    model = load_model(source, config)
    return _write(untrained_checkpoint(model, config, beginning, str(source)), format_name, config)


def go_on(
    source: Path, format_name: str, config: RunConfig, beginning: Callable[[int, int], Mapping[str, Any]]
) -> Path:
    """Write RUN/checkpoints/step-N with weights, optimizer states and clocks, N steps after that training began.

    Args:
        source, format_name, config: as for `begin_run`; the optimizer must be the one that `source` holds.
        beginning: (steps, samples) -> what training writes into a checkpoint there.

    Raises:
        ConversionError: as for `begin_run`, or the format holds no optimizer states.
    """
    _check_new(config)
    load_run = open_format(format_name).load_run
    if load_run is None:
        raise ConversionError(
            f"no optimizer states are read from the format {format_name}; leave --optimizer-states out, or bring a whole export of "
            "ours back with --checkpoint OUT"
        )
    return _write(load_run(source, config, beginning), format_name, config)


def _check_new(config: RunConfig) -> None:
    if list_checkpoints(config.run_dir / "checkpoints"):
        raise ConversionError(f"{config.run_dir} has checkpoints already; give the run another name")


def _write(unsharded: UnshardedCheckpoint, format_name: str, config: RunConfig) -> Path:
    path = config.run_dir / "checkpoints" / step_directory_name(unsharded.description["progress"]["step"])
    return write_checkpoint(unsharded.with_history(f"import from {format_name}"), unsharded.layout, path).directory
