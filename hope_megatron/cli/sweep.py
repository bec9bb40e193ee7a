"""Scaling laws: plan a sweep, run its cells, fit laws to them, and get a recommended run.

  hope sweep plan demo                        cells with parameters, tokens, FLOPs, hours and price
  hope sweep run demo --workers 2             run what is missing, on this machine
  hope sweep run demo --cluster my_cluster    the same as one Slurm array
  hope sweep status demo --follow             a live table
  hope sweep fit demo                         coefficients with intervals (also of a CSV of your own runs)
  hope sweep report demo                      report.html, report.md, tables, a run file for what it recommends

A sweep is a file of configs/sweeps (by name) or any YAML file of that form; docs/scaling.md explains it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hope_megatron.cli.models import add_actions
from hope_megatron.cli.tables import new_table

if TYPE_CHECKING:
    from rich.console import Console

    from hope_megatron.sweep.analysis import FamilyAnalysis
    from hope_megatron.sweep.bootstrap import Estimate
    from hope_megatron.sweep.collect import Observation
    from hope_megatron.sweep.plan import Plan
    from hope_megatron.sweep.results import Results
    from hope_megatron.sweep.schema import FitConfig
    from hope_megatron.sweep.store import SweepDirectory

_REFRESH_S = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hope sweep`."""
    plan, run, status, fit, report = add_actions(
        parser,
        {
            "plan": "list the cells and what they cost; refuse what does not fit",
            "run": "run the cells that have not finished",
            "status": "where every cell stands",
            "fit": "fit laws and print their coefficients",
            "report": "write the report and the recommended run files",
        },
    )
    for command in (plan, run, status, report):
        command.add_argument("sweep", metavar="SWEEP", help="sweep file, or the name of one in configs/sweeps")
    fit.add_argument(
        "sweep", metavar="SWEEP|CSV", help="a sweep, or a CSV with the columns parameters, tokens and loss"
    )
    run.add_argument("--local", action="store_true", help="on this machine (the default without --cluster)")
    run.add_argument(
        "--workers", type=int, default=1, metavar="N", help="cells at a time on this machine (default: %(default)s)"
    )
    run.add_argument(
        "--cluster", metavar="NAME", help="cluster file, or the name of one in configs/clusters: one Slurm array"
    )
    run.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="nodes of each cell on the cluster (default: %(default)s)"
    )
    run.add_argument(
        "--limit", type=int, default=16, metavar="N", help="cells at a time on the cluster (default: %(default)s)"
    )
    for command in (run, report):
        command.add_argument(
            "--results",
            type=Path,
            metavar="FILE",
            help="results of finished cells: those that FILE has are taken as they are, new ones are added to it, "
            "so that another machine goes on",
        )
    for command in (plan, status, fit):
        command.add_argument("--json", action="store_true", help="print JSON")
    run.add_argument("--retry", action="store_true", help="take cells that were set aside up again")
    status.add_argument(
        "--follow", action="store_true", help="renew the table until every cell has ended; Ctrl-C leaves"
    )
    for command in (fit, report):
        command.add_argument(
            "--flops", type=float, metavar="C", help="compute to recommend a run for (default: fit.target_flops)"
        )
        command.add_argument(
            "--bootstrap", type=int, metavar="N", help="resamples behind the intervals (default: fit.bootstrap)"
        )
    report.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: the sweep's directory)")


def run(args: argparse.Namespace) -> int:
    """Run the action."""
    return {"plan": _plan, "run": _run, "status": _status, "fit": _fit, "report": _report}[args.action](args)


def _load(args: argparse.Namespace) -> Plan:
    from hope_megatron.sweep.plan import make_plan
    from hope_megatron.sweep.schema import load_sweep

    return make_plan(load_sweep(args.sweep))


def _plan(args: argparse.Namespace) -> int:
    from hope_megatron.config.hardware import find_hardware
    from hope_megatron.runtime.formatting import bytes_text, count_text, duration_text
    from hope_megatron.sweep.plan import check_budget

    plan = _load(args)
    if args.json:
        print(json.dumps(plan.facts(), indent=1))
        check_budget(plan)
        return 0
    sizes = ("width", "layers", "parameters", "tokens", "steps", "lr")
    table = new_table("", "cell", *sizes, "FLOPs", "bytes/device", "time", "device hours", "USD")
    for cell in plan.cells:
        model, config = cell.config.model, cell.config
        table.add_row(
            cell.name, str(model.hidden_size), str(model.num_layers), count_text(cell.num_parameters), count_text(cell.tokens),
            f"{config.training.steps}", f"{config.optim.lr:.3g}", count_text(cell.flops), bytes_text(cell.bytes_per_device),
            duration_text(3600 * cell.hours), f"{cell.device_hours:.3g}", f"{cell.usd:.3g}",
        )  # fmt: skip
    hardware, sweep = find_hardware(plan.sweep.hardware.name), plan.sweep
    console = _console()
    console.print(table)
    console.print(
        f"\n[bold]{len(plan.cells)} cells[/bold], {count_text(sum(cell.flops for cell in plan.cells))} FLOPs, about "
        f"[bold]{plan.device_hours:.3g} device hours[/bold] on {sweep.hardware.devices} x {hardware.name} per cell "
        f"({sweep.hardware.utilization or hardware.utilization:.0%} of the peak, assumed), {plan.usd:.2f} USD"
    )
    if here := _on_this_machine(plan):
        console.print(here)
    check_budget(plan)
    return 0


def _on_this_machine(plan: Plan) -> str:
    """What the cells would take on this machine's CPU, where it has no GPU and the sweep does not say what it runs on."""
    from hope_megatron.config.footprint import estimate
    from hope_megatron.config.hardware import find_hardware
    from hope_megatron.runtime.formatting import duration_text
    from hope_megatron.runtime.process import count_gpus

    hardware = plan.sweep.hardware
    if count_gpus() or "name" in hardware.model_fields_set:
        return ""
    hours = sum(estimate(cell.config, hardware.devices, find_hardware("cpu")).hours for cell in plan.cells)
    return (
        f"hardware.name is not given, so that {find_hardware(hardware.name).name} is priced; this machine has no GPU. On its CPU, "
        f"{hardware.devices} cores for each cell, the cells take about {duration_text(3600 * hours)} one after the other. "
        "To plan for that: hardware: {name: cpu}"
    )


def _run(args: argparse.Namespace) -> int:
    from hope_megatron.sweep.errors import SweepError
    from hope_megatron.sweep.plan import check_budget
    from hope_megatron.sweep.run import LocalRunner
    from hope_megatron.sweep.store import SweepDirectory
    from hope_megatron.sweep.tracking import link_children, open_parent

    if args.local and args.cluster:
        raise SweepError("--local and --cluster exclude each other; keep one")
    plan = _load(args)
    check_budget(plan)
    directory = SweepDirectory(plan.sweep.directory)
    directory.prepare(plan)
    results = _placed(args, plan, directory)
    open_parent(plan, directory)
    if args.cluster:
        return _queue(args, plan)
    runner = LocalRunner(
        plan,
        directory,
        args.workers,
        say=lambda line: print(line, flush=True),
        finished=lambda: _gather(results),
    )
    code = runner.run(retry=args.retry)
    link_children(plan, directory)
    if code == 0:
        print(f"all cells have finished; next: hope sweep report {args.sweep}")
    return code


def _placed(args: argparse.Namespace, plan: Plan, directory: SweepDirectory, *, to_run: bool = True) -> Results | None:
    """The file of results, after cells were taken from it and those that finished here were added."""
    from hope_megatron.sweep.results import Results

    if args.results is None:
        return None
    results = Results(args.results, plan, directory, to_run=to_run)
    if placed := results.place():
        print(f"{placed} cells finished elsewhere, from {args.results}")
    if to_run:
        _gather(results)
    return results


def _gather(results: Results | None) -> None:
    """Keep what has finished; a file that cannot be written now is written with the next cell."""
    if results is not None:
        try:
            results.gather()
        except OSError as error:
            print(f"{results.file} could not be written ({error.strerror}); it will be tried again", flush=True)


def _queue(args: argparse.Namespace, plan: Plan) -> int:
    from hope_megatron.sweep.array import submit_missing
    from hope_megatron.sweep.store import SweepDirectory
    from launch.cluster import load_cluster

    directory, cluster = SweepDirectory(plan.sweep.directory), load_cluster(args.cluster)
    job_id = submit_missing(plan, directory, cluster, args.nodes, limit=args.limit, retry=args.retry)
    if job_id is not None:
        print(f"queued as job array {job_id}; hope sweep status {args.sweep} --follow shows it")
    return 0


def _status(args: argparse.Namespace) -> int:
    from rich.live import Live

    from hope_megatron.sweep.status import goes_on, status_table, sweep_status
    from hope_megatron.sweep.store import SweepDirectory

    plan = _load(args)
    directory = SweepDirectory(plan.sweep.directory)
    statuses = sweep_status(plan, directory)
    if args.json:
        print(json.dumps([status.facts() for status in statuses], indent=1))
        return 0
    if not args.follow or not sys.stdout.isatty():
        _console().print(status_table(statuses, plan.sweep.name))
        return 0
    with Live(status_table(statuses, plan.sweep.name), auto_refresh=False) as live:
        while goes_on(statuses):
            time.sleep(_REFRESH_S)
            statuses = sweep_status(plan, directory)
            live.update(status_table(statuses, plan.sweep.name), refresh=True)
    return 0


def _fit(args: argparse.Namespace) -> int:
    from rich.table import Table

    from hope_megatron.sweep.analysis import analyse
    from hope_megatron.sweep.collect import read_csv
    from hope_megatron.sweep.recommend import target_flops
    from hope_megatron.sweep.report import coefficient_rows, interval_text, summary
    from hope_megatron.sweep.schema import FitConfig

    if Path(args.sweep).suffix == ".csv":
        config = _with_options(FitConfig(), args)
        families = analyse(read_csv(Path(args.sweep)), config)
    else:
        plan = _load(args)
        config = _with_options(plan.sweep.fit, args)
        families = analyse(_observations(plan), config)
    flops = target_flops(families, config.target_flops)
    if args.json:
        print(json.dumps(summary(families, flops), indent=1))
        return 0
    table = Table(box=None, pad_edge=False, title=f"{config.level:.0%} intervals", title_justify="left")
    for name in ("family", "law", "coefficient", "value"):
        table.add_column(name, header_style="dim")
    for family in families:
        for row in [*coefficient_rows(family), *_optimum_rows(family, flops)]:
            table.add_row(*row[:3], interval_text(row[3]))
    console = _console()
    console.print(table)
    for family in families:
        for check in family.heldout:
            console.print(
                f"held-out {check.name}: measured {check.measured:.4f}, "
                f"predicted {interval_text(check.predicted)}, {100 * check.error:+.2f} %"
            )
        for line in [
            *(
                f"outlier: {o.name} ({o.scales:.1f} robust standard deviations off), left out of all laws and intervals"
                for o in family.outliers
            ),
            *family.notes,
        ]:
            console.print(f"{family.family}: {line}")
    return 0


def _optimum_rows(family: FamilyAnalysis, flops: float) -> list[tuple[str, str, str, Estimate]]:
    optimum = family.optimum(flops)
    return (
        []
        if optimum is None
        else [(family.family, f"optimum at {flops:.2g} FLOPs", name, value) for name, value in optimum.items()]
    )


def _report(args: argparse.Namespace) -> int:
    from hope_megatron.sweep.analysis import analyse
    from hope_megatron.sweep.recommend import recommend, target_flops
    from hope_megatron.sweep.report import write_report
    from hope_megatron.sweep.status import sweep_status
    from hope_megatron.sweep.store import State, SweepDirectory
    from hope_megatron.sweep.tracking import link_children, log_report

    plan = _load(args)
    directory = SweepDirectory(plan.sweep.directory)
    if args.results is not None:
        directory.prepare(plan)
    observations = _observations(plan, _placed(args, plan, directory, to_run=False))
    config = _with_options(plan.sweep.fit, args)
    families = analyse(observations, config)
    flops = target_flops(families, config.target_flops)
    recommendations = recommend(plan, families, flops)
    unfinished = [status for status in sweep_status(plan, directory) if status.state is not State.FINISHED]
    missing = [f"`{s.cell.name}`: {s.state.value}{': ' + s.reason if s.reason else ''}" for s in unfinished]
    folder = args.out or plan.sweep.directory
    page = write_report(plan.sweep.name, folder, observations, families, recommendations, flops, missing=missing)
    link_children(plan, directory)
    log_report(directory, families, [page, folder / "report.md", folder / "cells.csv", folder / "fit.json"])
    print(f"{page}\n{folder / 'report.md'}")
    if recommendations:
        print(f"next: hope plan {folder / recommendations[0].config.name}.yaml")
    return 0


def _console() -> Console:
    """Tables keep their full width in files and pipes."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def _observations(plan: Plan, results: Results | None = None) -> list[Observation]:
    from data_pipeline import Manifest
    from hope_megatron.sweep.collect import collect
    from hope_megatron.sweep.store import SweepDirectory

    def unique_tokens(path: Path | str) -> int:
        return results.train_tokens if results else Manifest.load(path).tokens

    return collect(plan, SweepDirectory(plan.sweep.directory), unique_tokens)


def _with_options(config: FitConfig, args: argparse.Namespace) -> FitConfig:
    """The fit section with what the command line says instead."""
    from pydantic import ValidationError

    from hope_megatron.config.messages import explain

    given = {"target_flops": args.flops, "bootstrap": args.bootstrap}
    values = {**config.model_dump(), **{key: value for key, value in given.items() if value is not None}}
    try:
        return type(config).model_validate(values)
    except ValidationError as error:
        raise explain(error, type(config), lambda location: "command line", ("fit",)) from None
