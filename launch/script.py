"""Batch scripts: the templates of launch/templates, filled in."""

from __future__ import annotations

import shlex
import string
from collections.abc import Sequence
from pathlib import Path

from launch.cluster import ClusterConfig
from launch.submission import LaunchDirectory, Submission
from launch.variables import job_variables

_TEMPLATES = Path(__file__).parent / "templates"


class _Template(string.Template):
    """`@{name}` is filled in; `$` belongs to the shell."""

    delimiter = "@"


def train_script(cluster: ClusterConfig, submission: Submission, directory: LaunchDirectory) -> str:
    """The batch script of a run."""
    directives = [
        *_resources(
            cluster, submission.nodes, cluster.ranks_per_node, cluster.gpus_per_node, exclusive=cluster.exclusive
        ),
        f"--job-name={submission.name}",
        f"--output={directory.log}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{cluster.stop_before_end_s}",
    ]
    return _fill(
        "train.sbatch",
        title=f"{submission.name}: {submission.world_size} ranks on {submission.nodes} nodes",
        directives=_directives(directives),
        **_environment(cluster, directory.path),
        code=shlex.quote(submission.code),
        python=shlex.quote(cluster.python),
        run_dir=shlex.quote(str(directory.run_dir)),
    )


def array_script(cluster: ClusterConfig, submission: Submission, array_dir: Path, num_cells: int, limit: int) -> str:
    """The batch script of an array: each task is the supervisor of the run in `array_dir/cells/INDEX`.

    Args:
        submission: what all cells share; its name is that of the array.
        limit: how many cells run at the same time.
    """
    directives = [
        *_resources(
            cluster, submission.nodes, cluster.ranks_per_node, cluster.gpus_per_node, exclusive=cluster.exclusive
        ),
        f"--job-name={submission.name}",
        f"--array=0-{num_cells - 1}%{limit}",
        f"--output={array_dir}/cells/%a/launch/job.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{cluster.stop_before_end_s}",
    ]
    return _fill(
        "train.sbatch",
        title=f"{submission.name}: {num_cells} runs of {submission.world_size} ranks, {limit} at a time",
        directives=_directives(directives),
        **_environment(cluster, array_dir / "launch"),
        code=shlex.quote(submission.code),
        python=shlex.quote(cluster.python),
        run_dir=f'{shlex.quote(str(array_dir))}/cells/"$SLURM_ARRAY_TASK_ID"',
    )


def command_script(
    cluster: ClusterConfig, name: str, command: Sequence[str], *, code: Path, work_dir: Path, log: Path, gpus: int
) -> str:
    """The batch script of one command, `python -m hope_megatron COMMAND`, in one process on one node."""
    directives = [
        *_resources(cluster, 1, 1, gpus, exclusive=False),
        f"--job-name={name}",
        f"--output={log}",
        "--open-mode=append",
        "--no-requeue",
    ]
    srun = ["srun", "--ntasks=1", *container_options(cluster, [work_dir, code])]
    return _fill(
        "command.sbatch",
        title=f"{name}: hope {shlex.join(command)}",
        directives=_directives(directives),
        **_environment(cluster, log.parent),
        code=shlex.quote(str(code)),
        command=shlex.join([*srun, cluster.python, "-m", "launch.command", str(work_dir), *command]),
    )


def container_options(cluster: ClusterConfig, paths: Sequence[Path]) -> list[str]:
    """srun's options for the container, if there is one: `paths` are mounted under their own names, the last is where it starts."""
    if cluster.container is None:
        return []
    mounts = [*dict.fromkeys(f"{path}:{path}" for path in paths), *cluster.container.mounts]
    return [
        f"--container-image={cluster.container.image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={paths[-1]}",
    ]


def _resources(cluster: ClusterConfig, nodes: int, tasks_per_node: int, gpus: int, *, exclusive: bool) -> list[str]:
    options = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "time": cluster.time_limit,
        "nodes": nodes,
        "ntasks-per-node": tasks_per_node,
        "cpus-per-task": cluster.cpus_per_process,
        "mem": None
        if cluster.memory_per_node_gb is None
        else f"{cluster.memory_per_node_gb}G"
        if cluster.memory_per_node_gb
        else "0",
        "gres": f"{cluster.gpu_gres}:{gpus}" if gpus else None,
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [*lines, "--exclusive"] if exclusive else lines


def _directives(options: Sequence[str]) -> str:
    # Slurm splits directives like a shell does.
    return "\n".join(f"#SBATCH {shlex.quote(option)}" for option in options)


def _environment(cluster: ClusterConfig, launch_dir: Path) -> dict[str, str]:
    rows = job_variables(cluster, launch_dir)
    variables = [f"export {row.name}={shlex.quote(row.value)}  # {row.reason}" for row in rows]
    return {"setup": "\n".join(cluster.setup) or "# none", "variables": "\n".join(variables) or "# none"}


def _fill(template: str, **values: str) -> str:
    return _Template((_TEMPLATES / template).read_text(encoding="utf-8")).substitute(values)
