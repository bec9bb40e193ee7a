"""Batch scripts: the templates of launch/templates, filled in."""

from __future__ import annotations

import shlex
import string
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from hope_megatron.runtime.files import write_text
from launch.cluster import ClusterConfig, ContainerConfig
from launch.errors import LaunchError
from launch.options import option_words
from launch.submission import LaunchDirectory, Submission
from launch.variables import job_variables

_TEMPLATES = Path(__file__).parent / "templates"


SECRETS_FILE = "environment.sh"
"""Of the launch directory: the variables of the cluster file's `env`, mode 0600."""
_OF_SEVERAL_LINES = {"directives", "setup", "variables"}


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
        f"--output={_file_pattern(directory.log)}",
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
        f"--output={_file_pattern(array_dir)}/cells/%a/launch/job.log",
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
        f"--output={_file_pattern(log)}",
        "--open-mode=append",
        "--no-requeue",
    ]
    paths = [work_dir, code]
    srun = ["srun", "--ntasks=1", *container_options(cluster, paths), *option_words(cluster.srun)]
    srun += container_prefix(cluster, paths)
    return _fill(
        "command.sbatch",
        title=f"{name}: hope {shlex.join(command)}",
        directives=_directives(directives),
        **_environment(cluster, log.parent),
        code=shlex.quote(str(code)),
        command=shlex.join([*srun, cluster.python, "-m", "launch.command", str(work_dir), *command]),
    )


def container_options(cluster: ClusterConfig, paths: Sequence[Path]) -> list[str]:
    """srun's options for a container of pyxis, if there is one: `paths` are mounted under their own names, the last is where it
    starts."""
    if cluster.container is None or cluster.container.runtime != "pyxis":
        return []
    mounts = _mounts(cluster.container, paths)
    return [
        f"--container-image={cluster.container.image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={paths[-1]}",
    ]


def container_prefix(cluster: ClusterConfig, paths: Sequence[Path]) -> list[str]:
    """What stands before the ranks' command for a container of apptainer, if there is one; `paths` as for container_options."""
    container = cluster.container
    if container is None or container.runtime != "apptainer":
        return []
    gpus = ["--nv"] if cluster.gpus_per_node else []
    bind = [f"--bind={','.join(_mounts(container, paths))}", f"--pwd={paths[-1]}"]
    return ["apptainer", "exec", *gpus, *bind, *container.options, container.image]


def _mounts(container: ContainerConfig, paths: Sequence[Path]) -> list[str]:
    for path in paths:
        if any(character in str(path) for character in ",:"):
            raise LaunchError(
                f"{path} has a comma or a colon, by which container mounts are divided; choose another path"
            )
    return [*dict.fromkeys(f"{path}:{path}" for path in paths), *container.mounts]


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
    return [*lines, *(["--exclusive"] if exclusive else []), *option_words(cluster.sbatch)]


def _directives(options: Sequence[str]) -> str:
    # Slurm splits directives like a shell does, and reads % in the names of files.
    return "\n".join(f"#SBATCH {shlex.quote(plain(option))}" for option in options)


def _environment(cluster: ClusterConfig, launch_dir: Path) -> dict[str, str]:
    rows = [row for row in job_variables(cluster, launch_dir) if row.name not in cluster.env]
    variables = [f"export {row.name}={shlex.quote(plain(row.value))}  # {row.reason}" for row in rows]
    if cluster.env:
        secrets = launch_dir / SECRETS_FILE
        variables.append(
            f". {shlex.quote(str(secrets))}  # {', '.join(cluster.env)}: only its owner may read the values"
        )
    return {"setup": "\n".join(cluster.setup) or "# none", "variables": "\n".join(variables) or "# none"}


def write_secrets(cluster: ClusterConfig, launch_dir: Path) -> None:
    """The variables of the cluster file's `env`, which may be secrets, in a file that only its owner may read."""
    if not cluster.env:
        return
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in cluster.env.items()]
    write_text(launch_dir / SECRETS_FILE, "".join(lines), private=True)


def _file_pattern(path: Path) -> str:
    return str(path).replace("%", "%%")


def plain(text: str) -> str:
    """A text that stays on its line.

    Raises:
        LaunchError: it has a line break or another control character, with which it would leave a comment and become shell.
    """
    if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in text):
        raise LaunchError(f"{text!r} has a line break or another control character; choose a name or path without any")
    return text


def _fill(template: str, **values: str) -> str:
    """Fill a template in. Only what the cluster file says to the shell itself, and our own lines, may have several lines."""
    for name, value in values.items():
        if name not in _OF_SEVERAL_LINES:
            plain(value)
    return _Template((_TEMPLATES / template).read_text(encoding="utf-8")).substitute(values)
