"""The missing cells of a sweep as one Slurm array: every task is the supervisor of one cell, restartable alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.plan import Cell, Plan
from hope_megatron.sweep.store import State, SweepDirectory
from launch import slurm
from launch.attempts import History
from launch.cluster import ClusterConfig
from launch.freeze import freeze_code
from launch.jobs import active_job, describe, write_files
from launch.preflight import preflight, require, slurm_preflight
from launch.script import array_script
from launch.submission import LaunchDirectory, Submission, write_atomically, write_submission


def submit_missing(
    plan: Plan,
    directory: SweepDirectory,
    cluster: ClusterConfig,
    nodes: int,
    *,
    limit: int,
    retry: bool = False,
    report: Callable[[str], None] = print,
) -> str | None:
    """Queue the cells that are neither finished nor queued.

    Args:
        cluster: what the cells run on.
        nodes: nodes of each cell.
        limit: how many cells run at the same time.
        retry: take cells that were set aside up again.

    Returns:
        The job id, or None if nothing is missing.

    Raises:
        LaunchError: a cell does not pass the checks.
        SlurmError: Slurm refuses the array.
    """
    slurm.require_slurm()
    missing = [cell for cell in plan.cells if _is_missing(directory, cell, retry)]
    report(f"{len(missing)} cells to queue, {len(plan.cells) - len(missing)} finished, queued or set aside")
    if not missing:
        return None
    ranks = nodes * cluster.ranks_per_node
    if ranks != plan.sweep.hardware.devices:
        raise SweepError(
            f"the sweep plans hardware.devices={plan.sweep.hardware.devices} for each cell, "
            f"{nodes} nodes of this cluster are {ranks} ranks; change one of them"
        )
    for cell in missing:
        require(preflight(cell.config, cluster, nodes))
    folder = next(path for i in itertools.count(1) if not (path := directory.path / "arrays" / str(i)).exists())
    (folder / "cells").mkdir(parents=True)
    code = freeze_code(folder / "launch" / "code")
    launches = [(LaunchDirectory(cell.config.run_dir), describe(cell.config, cluster, nodes, code)) for cell in missing]
    for index, (cell, (launch, submission)) in enumerate(zip(missing, launches, strict=True)):
        write_files(cell.config, cluster, submission, launch)
        (folder / "cells" / str(index)).symlink_to(cell.config.run_dir)
        History(launch.attempts).submitted()
    job_id = _submit(plan, cluster, nodes, folder, launches[0][1], len(missing), limit)
    for index, (launch, submission) in enumerate(launches):
        write_submission(launch, replace(submission, job_id=f"{job_id}_{index}"))
    return job_id


def _submit(
    plan: Plan, cluster: ClusterConfig, nodes: int, folder: Path, submission: Submission, num_cells: int, limit: int
) -> str:
    script = folder / "array.sbatch"
    write_atomically(script, array_script(cluster, replace(submission, name=plan.sweep.name), folder, num_cells, limit))
    require(slurm_preflight(cluster, nodes, script))
    return slurm.submit(script)


def _is_missing(directory: SweepDirectory, cell: Cell, retry: bool) -> bool:
    state = directory.state(cell)
    if state is State.FINISHED or state is State.RUNNING or (state is State.SET_ASIDE and not retry):
        return False
    return active_job(LaunchDirectory(cell.config.run_dir)) is None
