"""The missing cells of a sweep as one Slurm array: every task is the supervisor of one cell, restartable alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.plan import Cell, Plan
from hope_megatron.sweep.store import State, SweepDirectory
from launch import slurm
from launch.arrays import queue_array
from launch.cluster import ClusterConfig
from launch.jobs import active_job
from launch.preflight import preflight, require
from launch.submission import LaunchDirectory


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
    return queue_array(folder, plan.sweep.name, [cell.config for cell in missing], cluster, nodes, limit)


def _is_missing(directory: SweepDirectory, cell: Cell, retry: bool) -> bool:
    state = directory.state(cell)
    if state is State.FINISHED or state is State.RUNNING or (state is State.SET_ASIDE and not retry):
        return False
    return active_job(LaunchDirectory(cell.config.run_dir)) is None
