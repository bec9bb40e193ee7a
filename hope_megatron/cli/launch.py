"""Take a run to a Slurm cluster, and look after it.

  hope launch CONFIG --cluster NAME --nodes N [key.sub=value ...]     check, freeze the code, submit
  hope launch CONFIG --cluster NAME --nodes N --dry-run               show the batch script and the checks
  hope launch --explain                                               every key of a cluster file
  hope launch CONFIG --local [--nproc N]                              the same run on this machine
  hope launch status RUN                                              state, step, speed, restarts (also of arrays and chains)
  hope launch logs RUN [--follow]                                     the job's log
  hope launch cancel RUN [--now]                                      save and end the job; --now: without saving
  hope launch resume RUN [--nodes N] [key.sub=value ...]              submit again, from the newest checkpoint
  hope launch array CONFIG --cluster NAME --vary optim.lr=1e-3,3e-3   one run per combination, as a job array
  hope launch chain CHAIN.yaml --cluster NAME                         jobs that follow each other (docs/launch.md)

NAME is a file in configs/clusters, or the path of one. RUN is a run directory.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.errors import LaunchError

_ACTIONS = {
    "status": ("json",),
    "logs": ("follow", "lines"),
    "cancel": ("now",),
    "resume": ("cluster", "nodes"),
    "array": ("cluster", "nodes", "vary", "limit", "dry_run"),
    "chain": ("cluster", "dry_run"),
}
"""Options that each action knows."""
_SUBMIT_OPTIONS = ("cluster", "nodes", "dry_run", "local", "nproc", "oversubscribe")
_DEFAULTS: dict[str, Any] = {
    "cluster": None,
    "nodes": None,
    "dry_run": False,
    "local": False,
    "nproc": None,
    "oversubscribe": False,
    "follow": False,
    "lines": 50,
    "now": False,
    "vary": [],
    "limit": 4,
    "json": False,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hope launch`."""
    parser.usage = (
        "hope launch CONFIG --cluster NAME [options] [key.sub=value ...]\n       hope launch ACTION TARGET [options]"
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG | ACTION TARGET",
        help=f"a run file, or one of {', '.join(_ACTIONS)} and what it is about",
    )
    where = parser.add_argument_group("where to run")
    parser.set_defaults(**_DEFAULTS)
    where.add_argument("--cluster", metavar="NAME", help="a file of configs/clusters by name, or its path")
    where.add_argument("--nodes", type=int, metavar="N", help="nodes (default: 1; resume: as before)")
    where.add_argument("--dry-run", action="store_true", help="show the batch script and the checks, submit nothing")
    where.add_argument("--explain", action="store_true", help="every key of a cluster file, and leave")
    where.add_argument("--local", action="store_true", help="run on this machine instead")
    where.add_argument("--nproc", type=int, metavar="N", help="--local: processes (default: all visible GPUs)")
    where.add_argument("--oversubscribe", action="store_true", help="--local: allow more processes than cores or GPUs")
    actions = parser.add_argument_group("actions")
    actions.add_argument("--follow", "-f", action="store_true", help="logs: go on as the log grows")
    actions.add_argument("--lines", type=int, metavar="N", help="logs: how many to begin with (default: %(default)s)")
    actions.add_argument("--now", action="store_true", help="cancel: do not wait for a checkpoint")
    actions.add_argument(
        "--vary", action="append", metavar="KEY=V1,V2", help="array: values of one key; may be repeated"
    )
    actions.add_argument("--json", action="store_true", help="status, --explain: print JSON")
    actions.add_argument("--limit", type=int, metavar="N", help="array: runs at the same time (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Carry out the action."""
    if args.nodes is not None and args.nodes < 1:
        raise LaunchError(f"--nodes {args.nodes}: a job needs at least one")
    if args.explain:
        from launch.explain import explain_keys, explanation

        rows = [dict(zip(("key", "default", "meaning"), row)) for row in explain_keys()] if args.json else []
        print(json.dumps(rows, indent=1) if args.json else explanation())
        return 0
    if not args.words:
        raise LaunchError("hope launch needs a run file, or an action and its target; see hope launch --help")
    action, *rest = args.words
    _refuse_foreign_options(args, action)
    if action not in _ACTIONS:
        return _submit(args, action, rest)
    if not rest:
        raise LaunchError(
            f"hope launch {action} needs {'a configuration' if action in ('array', 'chain') else 'a run directory'}"
        )
    target, *overrides = rest
    if overrides and action not in ("resume", "array"):
        raise LaunchError(f"hope launch {action} takes one argument, not {' '.join(rest)}")
    if args.dry_run:
        return _dry_run(args, action, target, overrides)
    _HANDLERS[action](args, target, overrides)
    return 0


def _refuse_foreign_options(args: argparse.Namespace, action: str) -> None:
    """An option that would be ignored is a mistake: `array --dry-run` must not submit."""
    known = _ACTIONS.get(action, _SUBMIT_OPTIONS)
    for name, default in _DEFAULTS.items():
        if getattr(args, name) != default and name not in known:
            what = action if action in _ACTIONS else "CONFIG"
            raise LaunchError(f"hope launch {what} does not take --{name.replace('_', '-')}")


def _submit(args: argparse.Namespace, config_name: str, overrides: list[str]) -> int:
    if args.local:
        return _run_here(args, config_name, overrides)
    from hope_megatron.config.trackers import TRACKERS
    from hope_megatron.training.tracking import check_tracking
    from launch.cluster import load_cluster
    from launch.jobs import dry_run, load_config, rank_command, submit_run

    config, cluster, nodes = load_config(config_name, overrides), load_cluster(_cluster_name(args)), args.nodes or 1
    if args.dry_run:
        rendered = dry_run(config, cluster, nodes)
        print(rendered.script)
        print(f"# the supervisor starts the ranks with\n{shlex.join(rank_command(rendered.submission))}\n")
        print("# checks")
        for check in rendered.checks:
            print(check)
        return 0 if all(check.ok for check in rendered.checks) else 2
    check_tracking(config)
    submission = submit_run(config, cluster, nodes)
    _print_submission(config.run_dir, str(submission.job_id))
    for tracker in config.tracking.names:
        print(f"tracked  by {TRACKERS.open(tracker).title}, {TRACKERS.open(tracker).where(config)}")
    return 0


def _run_here(args: argparse.Namespace, config_name: str, overrides: list[str]) -> int:
    from hope_megatron.cli import train

    parser = argparse.ArgumentParser(prog="hope launch --local")
    train.add_arguments(parser)
    options = [] if args.nproc is None else ["--nproc", str(args.nproc)]
    options += ["--oversubscribe"] if args.oversubscribe else []
    return train.run(parser.parse_intermixed_args([config_name, *overrides, *options]))


def _status(args: argparse.Namespace, target: str, overrides: list[str]) -> None:
    from launch.arrays import array_runs
    from launch.chain import chain_status
    from launch.status import run_status

    path = Path(target).absolute()
    if (path / "chain.json").exists():
        links = chain_status(path)
        print(_as_json(links) if args.json else "\n".join([f"chain {path.name}", *map(str, links)]))
        return
    runs = (run_status(run_dir) for run_dir in array_runs(path) or [path])
    for shown in [_as_json(list(runs))] if args.json else runs:
        print(shown)


def _as_json(found: Sequence[Any]) -> str:
    return json.dumps([asdict(one) for one in found], indent=1)


def _logs(args: argparse.Namespace, target: str, overrides: list[str]) -> None:
    from launch.status import follow_log

    for line in follow_log(Path(target).absolute(), lines=args.lines, follow=args.follow):
        print(line, end="", flush=args.follow)


def _cancel(args: argparse.Namespace, target: str, overrides: list[str]) -> None:
    from launch.arrays import array_runs
    from launch.jobs import active_job, cancel_run
    from launch.submission import LaunchDirectory

    path = Path(target).absolute()
    runs = [run for run in array_runs(path) if active_job(LaunchDirectory(run)) is not None] or [path]
    for run_dir in runs:
        print(cancel_run(run_dir, now=args.now))


def _resume(args: argparse.Namespace, target: str, overrides: list[str]) -> None:
    from launch.jobs import resume_run

    submission = resume_run(Path(target), nodes=args.nodes, overrides=overrides, cluster=args.cluster)
    _print_submission(Path(target).absolute(), str(submission.job_id))


def _array(args: argparse.Namespace, target: str, overrides: list[str]) -> None:
    from hope_megatron.training.tracking import check_tracking
    from launch.arrays import grid, submit_array
    from launch.cluster import load_cluster
    from launch.jobs import load_config

    if not args.vary:
        raise LaunchError("hope launch array needs --vary, for example --vary optim.lr=1e-3,3e-3")
    check_tracking(load_config(target, overrides))
    directory, job_id = submit_array(
        target,
        grid(args.vary),
        load_cluster(_cluster_name(args)),
        args.nodes or 1,
        overrides=overrides,
        limit=args.limit,
    )
    print(f"job     {job_id}\narray   {directory}; `hope launch status {directory}` shows its runs")


def _chain(args: argparse.Namespace, target: str, overrides: list[str]) -> None:
    from launch.chain import load_chain, submit_chain
    from launch.cluster import load_cluster

    directory, _ = submit_chain(load_chain(Path(target)), load_cluster(_cluster_name(args)))
    print(f"chain   {directory}; `hope launch status {directory}` shows its links")


def _dry_run(args: argparse.Namespace, action: str, target: str, overrides: list[str]) -> int:
    """Show what an array or a chain would submit."""
    from launch.arrays import grid
    from launch.chain import load_chain
    from launch.cluster import load_cluster
    from launch.dry_runs import dry_run_array, dry_run_chain

    cluster = load_cluster(_cluster_name(args))
    if action == "chain":
        shown = dry_run_chain(load_chain(Path(target)), cluster)
    elif not args.vary:
        raise LaunchError("hope launch array needs --vary, for example --vary optim.lr=1e-3,3e-3")
    else:
        shown = dry_run_array(target, grid(args.vary), cluster, args.nodes or 1, overrides=overrides, limit=args.limit)
    print("\n".join(map(str, shown)), end="")
    return 0 if all(check.ok for job in shown for check in job.checks) else 2


def _cluster_name(args: argparse.Namespace) -> str:
    from launch.cluster import cluster_names

    if args.cluster is None:
        raise LaunchError(f"say where to run: --local, or --cluster with a file or one of {', '.join(cluster_names())}")
    return str(args.cluster)


def _print_submission(run_dir: Path, job_id: str) -> None:
    print(
        f"job     {job_id}\nrun     {run_dir}\nlog     {run_dir / 'launch' / 'job.log'}; `hope launch logs --follow {run_dir}`"
    )


_HANDLERS = {"status": _status, "logs": _logs, "cancel": _cancel, "resume": _resume, "array": _array, "chain": _chain}
