"""One training step of a job of any size, rehearsed on this machine: kernels, memory, collectives, waits, time.

Engine, DeepSpeed and optimizer run for real, on tensors without values and with peers that are not there. Figures are counted
for one rank; times are counts over the rates of the named GPU. Nothing here is measured on a GPU.

examples:
  hope rehearse hope_760m --world 64                           a model, in a run of the usual shape
  hope rehearse hope_760m_30b --world 8 --png step.png         a run file, with a picture
  hope rehearse hope_7b --world 64 parallel.tensor_parallel=8 parallel.sequence_parallel=true
  hope rehearse hope_760m --world 8 --against transformer_pp_760m
  hope rehearse hope_760m --world 64 training.seq_length=1048576 training.global_batch_size=1 --pass-states 64
  hope rehearse hope_760m --world 8 --against "hope_760m training.micro_batch_size=8"
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import warnings
from pathlib import Path
from typing import Any

from hope_megatron.cli.output_files import check_writable
from hope_megatron.cli.plan import add_planned
from hope_megatron.config.base import ConfigError
from hope_megatron.config.hardware import find_hardware
from hope_megatron.config.planned_run import load_for_plan
from hope_megatron.config.sharing import slice_config
from hope_megatron.runtime.files import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hope rehearse`."""
    add_planned(parser, "training.micro_batch_size=8")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="whose step (default: %(default)s)")
    parser.add_argument(
        "--pass-states",
        type=int,
        metavar="N",
        help="what it would cost to share each sequence between N ranks by passing states, where heads do not suffice (not built)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw memory over the step and time by kernel family")
    parser.add_argument(
        "--against",
        metavar="OTHER",
        help="compare with another configuration: its name, and overrides of its own in the same word, quoted",
    )


def run(args: argparse.Namespace) -> int:
    """Rehearse, print, write."""
    check_writable(args.json, args.png)
    chosen = [(args.config, args.overrides)]
    if args.against is not None:
        other = shlex.split(args.against)
        if not other:
            raise ConfigError("--against: give a configuration")
        chosen.append((other[0], [*args.overrides, *other[1:]]))
    found = [_rehearse(name, overrides, args) for name, overrides in chosen]
    from hope_megatron.cli.rehearse_report import print_comparison, print_verdict

    if len(found) == 1:
        print_verdict(found[0])
    else:
        print_comparison(found[0], found[1])
    if args.json is not None:
        content = found[0] if len(found) == 1 else {"this": found[0], "against": found[1]}
        write_text(args.json, json.dumps(content, indent=1) + "\n")
    if args.png is not None:
        from hope_megatron.rehearse.picture import draw

        draw(found[0], args.png)
    return 0


def _rehearse(name: str, overrides: list[str], args: argparse.Namespace) -> dict[str, Any]:
    config, hardware = load_for_plan(name, overrides), find_hardware(args.hardware)
    world = config.parallel.ranks_per_sequence if args.world is None else args.world
    if args.pass_states is not None:
        config = slice_config(config, args.pass_states)
        world = args.pass_states * config.parallel.tensor_parallel if args.world is None else world
    if world < 1:
        raise ConfigError(f"--world {world}: give at least 1")
    if not 0 <= args.rank < world:
        raise ConfigError(f"--rank {args.rank}: the ranks of a world of {world} are 0 to {world - 1}")
    config.accumulation_steps(world)  # a mesh that does not divide is refused before the long imports
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # fake tensors have nothing to compile for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-Core names, at import, what a CPU does not have
        from hope_megatron.rehearse.rehearse import rehearse
        from hope_megatron.rehearse.verdict import verdict

        depths, watch = rehearse(config, world, rank=args.rank)
    return verdict(depths, watch.groups, world, hardware, rank=args.rank, pass_states=args.pass_states)
