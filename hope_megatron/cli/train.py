"""Pretrain a model as a run file says.

    hope train configs/runs/NAME.yaml optim.lr=1e-3 --nproc 2     on this machine
    torchrun --nproc-per-node 8 -m hope_megatron train ...        under any launcher that sets RANK and WORLD_SIZE
    srun hope train ...   or   mpirun -n 8 hope train ...         one rank per task, on any number of nodes

    hope train FILE data.train=data/v2/train --data-transition "more code"   go on with other data, on purpose and recorded

The same command continues a run that was stopped, from its newest good checkpoint. Ctrl-C saves and leaves. A process that dies
or hangs is started again with all others. A Python error that comes back at the same step ends the run.
"""

from __future__ import annotations

import argparse
import os

from hope_megatron.cli.models import add_local_arguments
from hope_megatron.config import RunConfig, dump_config, load_run_config
from hope_megatron.runtime.launchers import adopt_launcher
from hope_megatron.runtime.process import count_gpus
from hope_megatron.runtime.rank import be_a_rank, default_processes
from hope_megatron.runtime.world import REQUIRED, WorldError, launched_world
from hope_megatron.training.run_directory import RunDirectory
from hope_megatron.training.tracking import check_tracking

PRELOAD = ("hope_megatron.training.run", "hope_megatron.engine.preload")
"""What every rank imports; on a machine without GPUs it is imported once."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hope train`."""
    parser.add_argument("config", help="run file, or the name of one in configs/runs")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes to the configuration")
    add_local_arguments(parser)
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: from the newest good checkpoint of the run, if any; never: insist on a fresh run; PATH: back to an earlier "
        "checkpoint of this run, or from one of another run while this one has none",
    )
    parser.add_argument(
        "--data-transition",
        metavar="REASON",
        help="go on although the training data have changed since the checkpoint, from their beginning; the reason is recorded "
        "in the run's data_ledger.jsonl. Without it a change is refused",
    )
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="train in this very process, for a debugger: one rank, nothing watches it or starts it again",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and leave")
    parser.add_argument("--port", type=int, metavar="N", help="rendezvous port on this machine (default: a free one)")


def run(args: argparse.Namespace) -> int:
    """Start the processes of a run, or be one of them."""
    from launch.errors import LaunchError

    launcher = adopt_launcher()
    world = launched_world()
    if world is not None and args.nproc is not None:
        raise WorldError(
            f"--nproc {args.nproc} starts processes, but {world} say that a launcher has started this one. Leave --nproc out, "
            f"or unset {' '.join(REQUIRED)}"
        )
    if world is not None and not args.dry_run:
        load = lambda: load_run_config(args.config, args.overrides)  # noqa: E731
        return be_a_rank(world, launcher, load, lambda config: _train(config, args))
    config = load_run_config(args.config, args.overrides)
    nproc = world.world_size if world else args.nproc
    if nproc is None:
        gpus = 0 if args.in_process else count_gpus()
        nproc = default_processes(config.parallel.ranks_per_sequence, gpus)
    if nproc < 1:
        raise LaunchError(f"--nproc {nproc}: a run needs at least one process")
    accumulation = config.accumulation_steps(nproc)
    if world is not None and world.rank > 0:
        return 0  # a dry run of several processes: the first one speaks
    if args.dry_run:
        print(dump_config(config), end="")
        tokens = f"{config.training.tokens_per_step:,} tokens per step, {config.training.tokens:,} in all"
        print(
            f"# {nproc} processes, data parallel {config.data_parallel(nproc)}, accumulation {accumulation}; {tokens}"
        )
        print("\n".join(f"# {line}" for line in _outlook(config)))
        return 0
    # Mistakes that can be seen without torch show here, at once, and before any process starts.
    from hope_megatron.training.sources import open_sources

    open_sources(config)
    check_tracking(config)
    directory = RunDirectory(config.run_dir)
    directory.acquire()
    directory.release()
    if args.in_process:
        from hope_megatron.runtime.process import apply_process_environment

        if nproc > 1:
            raise LaunchError(f"--in-process is for one rank, not for {nproc}; leave it out, or give --nproc 1")
        apply_process_environment(config.training.num_threads)
        return _train(config, args)
    from launch.local import run_supervised

    return run_supervised(
        ["train", args.config, *args.overrides, "--resume", args.resume, *_transition_argument(args)],
        nproc,
        config.run_dir,
        name=config.name,
        steps=config.training.steps,
        max_restarts=args.max_restarts,
        num_threads=config.training.num_threads,
        oversubscribe=args.oversubscribe,
        port=args.port,
        preload=PRELOAD,
    )


def _outlook(config: RunConfig) -> list[str]:
    """How often a run will read its data, and what it will do otherwise than at its newest start."""
    from hope_megatron.training.epochs import passes_text, repetition_warning
    from hope_megatron.training.history import outlook
    from hope_megatron.training.sources import count_passes

    lines = outlook(config, RunDirectory(config.run_dir))
    passes, why_not = count_passes(config)
    if why_not:
        return [f"epochs unknown: {why_not}", *lines]
    warning = repetition_warning(passes)
    return [passes_text(passes), *([f"warning: {warning}"] if warning else []), *lines]


def _transition_argument(args: argparse.Namespace) -> list[str]:
    return [] if args.data_transition is None else [f"--data-transition={args.data_transition}"]


def _train(config: RunConfig, args: argparse.Namespace) -> int:
    """Train in this process. Returns 0, or 128 + the signal that ended the run early."""
    from hope_megatron.runtime.heartbeat import HEART
    from hope_megatron.runtime.process import silence_import_warnings
    from hope_megatron.training.phases import PhaseClock

    silence_import_warnings()
    HEART.limits = config.resilience.hang.limits
    if os.environ.get("HOPE_FAULTS"):
        from hope_megatron.testing.faults import install_faults

        install_faults(config)
    phases = PhaseClock.of_this_process()
    from hope_megatron.training.sources import continuing, open_sources

    train_source, heldout_source = open_sources(config)
    phases.mark("data")
    from hope_megatron.parallel.distributed import shutdown_distributed
    from hope_megatron.training.run import run_training

    phases.mark("imports")
    finished = run_training(
        config,
        train_source,
        heldout_source,
        resume=args.resume,
        continue_data=continuing(config, args.data_transition),
        phases=phases,
    )
    shutdown_distributed()
    return 128 + finished.stop_signal if finished.stop_signal else 0
