"""What Slurm's srun and Open MPI's mpirun say of a process, put into the variables that torchrun sets and torch reads."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Mapping, MutableMapping

from hope_megatron.runtime.world import WorldError

Variables = dict[str, str]

_FIRST_PORT, _NUM_PORTS = 12000, 20000
"""Below the ports that Linux gives to clients (32768 on)."""


def adopt_launcher(environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where srun or mpirun started this process
    as one of several. Where they are set already, by torchrun or by hand, they stay, and must fit.

    One task alone is no world: it may start processes itself.

    Returns:
        The launcher's name; None where there is none, or torch's variables were there.

    Raises:
        WorldError: in one line, where variables contradict each other or say too little.
    """
    for name, read in _LAUNCHERS.items():
        variables = read(environment)
        if variables is None:
            continue
        if "RANK" in environment or "WORLD_SIZE" in environment:
            _check_agreement(name, variables, environment)
            return None
        environment.update({key: value for key, value in variables.items() if not environment.get(key)})
        for key in [key for key in environment if key.startswith("OMPI_COMM_WORLD_")]:
            del environment[
                key
            ]  # DeepSpeed compares them with LOCAL_RANK, which may come to mean the only GPU in sight
        return name
    return None


def srun_world(environment: Mapping[str, str]) -> Variables | None:
    """Torch's variables for a task of a Slurm step; None outside of steps (a batch script, a login node) and for one task.

    Raises:
        WorldError: numbers are missing or do not fit.
    """
    if "SLURM_STEP_ID" not in environment:
        return None
    rank, world_size, local_rank, node = _numbers(
        environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID"
    )
    if world_size == 1:
        return None
    _check_rank(rank, world_size, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    tasks = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if sum(tasks) != world_size or not 0 <= node < len(tasks):
        raise WorldError(
            f"SLURM_STEP_TASKS_PER_NODE={environment.get('SLURM_STEP_TASKS_PER_NODE', '')} and SLURM_NODEID={node} do not fit "
            f"SLURM_STEP_NUM_TASKS={world_size}; start the processes with srun, or set torch's variables with torchrun"
        )
    step = int(environment["SLURM_STEP_ID"]) if environment["SLURM_STEP_ID"].isdecimal() else 0
    number = int(environment.get("SLURM_JOB_ID", "0")) + 997 * step
    return {
        **_ranks(rank, world_size, local_rank, tasks[node]),
        "MASTER_ADDR": first_host(environment.get("SLURM_STEP_NODELIST", "")),
        "MASTER_PORT": str(_FIRST_PORT + number % _NUM_PORTS),
    }


def mpirun_world(environment: Mapping[str, str]) -> Variables | None:
    """Torch's variables for a process of Open MPI's mpirun; None without one, or with one process only.

    Raises:
        WorldError: numbers are missing or do not fit, or nothing says where the first process runs.
    """
    if not {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"} & environment.keys():
        return None
    rank, world_size, local_rank, local_size = _numbers(
        environment, *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    )
    if world_size == 1:
        return None
    _check_rank(rank, world_size, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    if local_size == world_size:
        address = "127.0.0.1"
    elif not (address := environment.get("MASTER_ADDR", "")):
        raise WorldError(
            f"mpirun started {world_size} processes on several nodes, and does not say where the first one runs: give "
            "-x MASTER_ADDR=HOST of the first node"
        )
    identity = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid", "")
    return {
        **_ranks(rank, world_size, local_rank, local_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(_FIRST_PORT + zlib.crc32(identity.encode()) % _NUM_PORTS),
    }


# mpirun inside a Slurm job starts its daemons by srun, whose variables every process inherits: Open MPI's count.
_LAUNCHERS: dict[str, Callable[[Mapping[str, str]], Variables | None]] = {"mpirun": mpirun_world, "srun": srun_world}


def tasks_per_node(text: str) -> list[int]:
    """Tasks of each node, from Slurm's short form: `2(x3),1` is [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise WorldError(f"SLURM_STEP_TASKS_PER_NODE={text} is not of the form 2(x3),1")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def first_host(nodes: str) -> str:
    """The first host of Slurm's list of nodes: `gpu[007-009,12],login` begins with gpu007."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if match is None:
        raise WorldError("SLURM_STEP_NODELIST is not set, or empty; set MASTER_ADDR and RANK yourself, or use torchrun")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


def _check_agreement(name: str, variables: Variables, environment: Mapping[str, str]) -> None:
    """What torch's variables say beside a launcher's: the same, or processes that every task of the launcher started."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return  # torchrun, once per task: it gives out its own ranks
    try:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    except (KeyError, ValueError):
        return  # launched_world says what is wrong with them
    tasks, task = int(variables["WORLD_SIZE"]), int(variables["RANK"])
    if world_size < tasks or world_size % tasks or rank // (world_size // tasks) != task:
        raise WorldError(
            f"the environment has RANK={rank} WORLD_SIZE={world_size}, but {name} says this is process {task} of {tasks}; "
            "unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT, and the ranks are the launcher's"
        )


def _ranks(rank: int, world_size: int, local_rank: int, local_size: int) -> Variables:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
    }


def _numbers(environment: Mapping[str, str], *names: str) -> list[int]:
    try:
        return [int(environment[name]) for name in names]
    except (KeyError, ValueError):
        found = " ".join(f"{name}={environment[name]}" for name in names if name in environment) or "none of them"
        raise WorldError(
            f"a launcher sets {', '.join(names)} to whole numbers; the environment has {found}. To run without a launcher: "
            f"unset {' '.join(names)} SLURM_STEP_ID"
        ) from None


def _check_rank(rank: int, world_size: int, rank_name: str, size_name: str) -> None:
    if not 0 <= rank < world_size:
        raise WorldError(f"{rank_name}={rank} must be from 0 to {world_size - 1} with {size_name}={world_size}")
