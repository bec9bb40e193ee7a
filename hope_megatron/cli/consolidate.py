"""Offline consolidation: a run reads documents by day; at night what its fast memories picked up moves into its slower weights.

    hope consolidate runs/NAME --wake today.txt                    read, sleep: the result is the run runs/NAME-night-1
    hope consolidate runs/NAME --wake a.txt b.txt --dry-run        what would be read, replayed and trained
    hope consolidate runs/NAME-night-1 --wake tomorrow.txt         another day and night
    hope consolidate runs/NAME --wake a.txt --unseen c.txt         does it help with documents of the kind that were not read?
    hope consolidate runs/NAME --wake a.txt --replay 128 --dreams 32 --levels 2 3:4 optim.lr=3e-4
    torchrun --nproc-per-node 8 -m hope_megatron consolidate ...   under any launcher, in the layout of the run

Wake: the files are read as one stream. Rows that surprise the memories most stay in a bounded buffer, with what the adapted model
answers. Sleep: CMS levels learn to answer so without the state, and general text as before. Wake: the state begins anew, and
what is left is measured. The night is a run like any other: tracked, resumed by the same command, and its checkpoints are for eval,
generate, export and train.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hope_megatron.cli.models import add_local_arguments, prepare_process
from hope_megatron.cli.train import PRELOAD
from hope_megatron.consolidation.options import NightOptions
from hope_megatron.runtime.launchers import adopt_launcher
from hope_megatron.runtime.process import count_gpus
from hope_megatron.runtime.rank import be_a_rank, default_processes
from hope_megatron.runtime.world import launched_world

if TYPE_CHECKING:
    from hope_megatron.consolidation.sleep import Night


_LISTS: dict[str, tuple[str, str]] = {
    "wake": ("FILE", "UTF-8 text that is read by day"),
    "unseen": ("FILE", "text of the same kind that is not read: scored before and after"),
    "general": ("FILE", "text whose answers shall not change (default: the run's training data)"),
    "levels": (
        "LEVEL[:PERIOD]",
        "CMS levels that learn, 1 the fastest (default: the next slower than what adapts in a context)",
    ),
}
_VALUES: dict[str, tuple[type, str, str]] = {
    "out": (str, "NAME", "name of the night's run (default: NAME-night-1, then -2)"),
    "replay": (int, "N", "rows kept at most"),
    "reservoir": (float, "SHARE", "share of them that is a uniform sample of the less surprising rows"),
    "priority": (float, "POWER", "replay in proportion to surprise to this power; 0: without surprise"),
    "dreams": (int, "N", "rows that the adapted model makes up"),
    "general_share": (float, "SHARE", "share of general text in a batch"),
    "draws": (int, "N", "answers kept for every token"),
    "steps": (int, "N", "optimizer steps of the night (default: every row about 8 times)"),
    "seed": (int, "N", "seed of draws, dreams and order"),
}
"""Type, what stands for the value, and help; the defaults are those of `NightOptions`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", help="a run directory (its newest checkpoint), RUN@STEP or a checkpoint")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration of the night"
    )
    for name, (metavar, text) in _LISTS.items():
        kind = Path if metavar == "FILE" else str
        parser.add_argument(f"--{name}", type=kind, nargs="+", default=[], metavar=metavar, help=text)
    defaults = NightOptions(())
    for name, (value_type, metavar, text) in _VALUES.items():
        default = getattr(defaults, name, None)
        shown = "" if default is None else f" (default {default})"
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=value_type, default=default, metavar=metavar, help=text + shown)
    add_local_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and leave")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Start the processes of a night, or be one of them."""
    launcher, world = adopt_launcher(), launched_world()
    prepare_process(1)
    if world is not None and not args.dry_run:
        nights: list[Night] = []

        def load() -> Any:
            nights.append(_night(args))
            return nights[0].config

        return be_a_rank(world, launcher, load, lambda config: _sleep(nights[0], args, world.rank == 0))
    night = _night(args)
    nproc = args.nproc or (
        world.world_size if world else default_processes(night.config.parallel.ranks_per_sequence, count_gpus())
    )
    night.config.accumulation_steps(nproc)
    if args.dry_run:
        _print(night.outline, args.json)
        return 0
    from launch.local import run_supervised

    code = run_supervised(
        _argv(args),
        nproc,
        night.config.run_dir,
        name=night.config.name,
        steps=night.config.training.steps,
        max_restarts=args.max_restarts,
        num_threads=night.config.training.num_threads,
        oversubscribe=args.oversubscribe,
        preload=PRELOAD,
    )
    if code == 0:
        _report(night, args.json)
    return code


def _argv(args: argparse.Namespace) -> list[str]:
    """The arguments again, for a worker."""
    argv = ["consolidate", args.run, *args.overrides]
    for name in _LISTS:
        if values := getattr(args, name):
            argv += [f"--{name}", *map(str, values)]
    for name in _VALUES:
        if (value := getattr(args, name)) is not None:
            argv += [f"--{name.replace('_', '-')}", str(value)]
    return argv


def _night(args: argparse.Namespace) -> Night:
    from hope_megatron.consolidation.sleep import plan_night

    names = {*_LISTS, *_VALUES} - {"out"}
    given: dict[str, Any] = {
        name: tuple(value) if name in _LISTS else value for name in names for value in [getattr(args, name)]
    }
    options = NightOptions(**given)
    return plan_night(args.run, options, args.out, tuple(args.overrides))


def _sleep(night: Night, args: argparse.Namespace, speaks: bool) -> int:
    from hope_megatron.consolidation.sleep import sleep_on_ranks
    from hope_megatron.parallel.distributed import shutdown_distributed
    from hope_megatron.runtime.heartbeat import HEART
    from hope_megatron.training.sources import open_sources

    HEART.limits = night.config.resilience.hang.limits
    finished = sleep_on_ranks(night, *open_sources(night.config))
    shutdown_distributed()
    return 128 + finished.stop_signal if finished.stop_signal else 0


def _report(night: Night, as_json: bool) -> None:
    from hope_megatron.consolidation.sleep import read_report

    _print(read_report(night), as_json)


def _print(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=1))
        return
    figures = found.pop("figures", {})
    for name, value in found.items():
        shown = ", ".join(f"{key} {x}" for key, x in value.items()) if isinstance(value, dict) else value
        print(f"{name.replace('_', ' '):<16} {shown}")
    for name in ("read", "unseen", "heldout"):
        if name in figures:
            shown = ", ".join(f"{key} {x:.4f}" for key, x in figures[name].items())
            print(f"{name:<16} nats per token: {shown}")
    if figures:
        kept = figures["retention"]
        print(
            f"{'retention':<16} {'nothing was gained by reading' if kept is None else f'{kept:.3f} of what the state held'}"
        )
