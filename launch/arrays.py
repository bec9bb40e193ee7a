"""Many runs as one Slurm array: each cell is an independent run with its own directory, restartable alone.

ARRAY/array.json      the cells and what varies between them
ARRAY/array.sbatch    the batch script
ARRAY/cells/INDEX     link to the run of that array index
ARRAY/NAME-INDEX/     the runs
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from hope_megatron.config import ConfigError, RunConfig
from hope_megatron.runtime.files import write_json, write_text
from launch import slurm
from launch.attempts import History
from launch.cluster import ClusterConfig
from launch.errors import LaunchError
from launch.freeze import freeze_code
from launch.jobs import describe, load_config, write_files
from launch.preflight import preflight, require, slurm_preflight
from launch.script import array_script
from launch.submission import LaunchDirectory, write_submission


def grid(axes: Iterable[str]) -> list[tuple[str, ...]]:
    """Overrides of each cell from axes like `optim.lr=1e-3,3e-3`: all combinations.

    Raises:
        ConfigError: if an axis is not of that form, or names a key twice.
    """
    columns: list[list[str]] = []
    keys: set[str] = set()
    for axis in axes:
        key, separator, values = axis.partition("=")
        if not separator or not key or not all(values.split(",")):
            raise ConfigError(f"--vary {axis!r} is not of the form key.sub=value,value,...")
        if key in keys:
            raise ConfigError(f"--vary names {key} twice; give all of its values once")
        keys.add(key)
        columns.append([f"{key}={value}" for value in values.split(",")])
    return list(itertools.product(*columns))


def submit_array(
    config: str,
    cells: Sequence[tuple[str, ...]],
    cluster: ClusterConfig,
    nodes: int,
    *,
    overrides: Iterable[str] = (),
    limit: int,
    report: Callable[[str], None] = print,
) -> tuple[Path, str]:
    """Queue one run per cell as an array; returns its directory and job id.

    Args:
        config: run file that all cells share.
        cells: overrides of each cell, after the common `overrides`.
        nodes: nodes of each cell.
        limit: how many cells run at the same time.

    Raises:
        LaunchError: if the directory exists, or a cell does not pass the checks.
        SlurmError: if Slurm refuses it.
    """
    slurm.require_slurm()
    base = load_config(config, overrides)
    array_dir = base.run_dir
    if array_dir.exists():
        raise LaunchError(f"{array_dir} exists already; give the array another name=..., or resume its runs one by one")
    runs = _load_cells(config, cells, overrides, base, cluster, nodes, report)
    try:
        job_id = queue_array(array_dir, base.name, runs, cluster, nodes, limit)
    except Exception:
        shutil.rmtree(array_dir)  # nothing was queued, and it was not there before
        raise
    record = {
        "job_id": job_id,
        "limit": limit,
        "cells": {run.name: list(cell) for run, cell in zip(runs, cells, strict=True)},
    }
    write_json(array_dir / "array.json", record)
    return array_dir, job_id


def _load_cells(
    config: str,
    cells: Sequence[tuple[str, ...]],
    overrides: Iterable[str],
    base: RunConfig,
    cluster: ClusterConfig,
    nodes: int,
    report: Callable[[str], None],
) -> list[RunConfig]:
    """The runs of an array, checked; each is named after the array and its index."""
    runs = []
    for index, cell in enumerate(cells):
        name = f"{base.name}-{index:0{len(str(len(cells) - 1))}d}"
        run = load_config(config, [*overrides, *cell])
        runs.append(run.model_copy(update={"name": name, "output_dir": base.run_dir}))
        checks = preflight(runs[-1], cluster, nodes)
        report(f"{name}: {' '.join(cell)}: {sum(check.ok for check in checks)} of {len(checks)} checks passed")
        require(checks)
    return runs


def queue_array(
    folder: Path, name: str, runs: Sequence[RunConfig], cluster: ClusterConfig, nodes: int, limit: int
) -> str:
    """Write what the runs and their array need, and queue it; returns the job id.

    Args:
        folder: of the array; exists no more than as far as its owner has made it.
        name: of the job.
        runs: checked configurations, one per array index, each with a run directory of its own.
        nodes: nodes of each run.
        limit: how many runs go at the same time.

    Raises:
        LaunchError: Slurm's own check of the script fails.
        SlurmError: Slurm refuses the array.
    """
    (folder / "cells").mkdir(parents=True)
    code = freeze_code(folder / "launch" / "code")
    directories = [LaunchDirectory(run.run_dir) for run in runs]
    submissions = [describe(run, cluster, nodes, code) for run in runs]
    for index, (run, directory, submission) in enumerate(zip(runs, directories, submissions, strict=True)):
        write_files(run, cluster, submission, directory)
        History(directory.attempts).submitted()
        (folder / "cells" / str(index)).symlink_to(run.run_dir)
    script = folder / "array.sbatch"
    write_text(script, array_script(cluster, replace(submissions[0], name=name), folder, len(runs), limit))
    require(slurm_preflight(cluster, nodes, script))
    job_id = slurm.submit(script)
    for index, (directory, submission) in enumerate(zip(directories, submissions, strict=True)):
        write_submission(directory, replace(submission, job_id=f"{job_id}_{index}"))
    return job_id


def array_runs(array_dir: Path) -> list[Path]:
    """Run directories of an array, by index; empty if the directory is not an array's."""
    return [path.resolve() for path in sorted((array_dir / "cells").glob("*"), key=lambda path: int(path.name))]
