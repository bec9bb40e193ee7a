"""The world that a launcher (torchrun, srun, a pod) has put this process into, as its variables say, or the mistake in them."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What every launcher sets, and the rendezvous of torch reads."""
_PREFIXES = ("TORCHELASTIC_", "ROLE_", "GROUP_", "OMPI_COMM_WORLD_")
_OTHERS = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID")


class WorldError(Exception):
    """Launcher variables that name no world: mostly left over in a shell or a pod."""

    is_user_error = True


class World(NamedTuple):
    """Place of this process among those that a launcher has started."""

    rank: int
    world_size: int
    local_rank: int

    def __str__(self) -> str:
        return f"RANK={self.rank} WORLD_SIZE={self.world_size}"


def launched_world(environment: Mapping[str, str] = os.environ) -> World | None:
    """What the launcher variables say; None where neither RANK nor WORLD_SIZE is set.

    Raises:
        WorldError: in one line with the variables, if some are missing, or are no numbers that fit.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    found = " ".join(f"{name}={environment[name]}" for name in REQUIRED if name in environment)
    missing = [name for name in REQUIRED if not environment.get(name)]
    if missing:
        problem = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set, or empty"
        raise WorldError(_message(found, problem))
    try:
        rank, world_size, _ = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        local_rank = int(environment.get("LOCAL_RANK", 0))
    except ValueError:
        raise WorldError(
            _message(found, "RANK, WORLD_SIZE, MASTER_PORT and LOCAL_RANK are not all whole numbers")
        ) from None
    if world_size < 1:
        raise WorldError(_message(found, "WORLD_SIZE must be at least 1"))
    if not 0 <= rank < world_size:
        raise WorldError(_message(found, f"RANK must be from 0 to {world_size - 1}"))
    return World(rank, world_size, local_rank)


def forget_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Take the launcher's variables away from this process and those that it starts: it is no part of a world."""
    for name in list(environment):
        if name in (*REQUIRED, *_OTHERS) or name.startswith(_PREFIXES):
            del environment[name]


def _message(found: str, problem: str) -> str:
    return (
        f"the environment has {found}, as from a launcher, but {problem}. A launcher (torchrun, srun) sets all of "
        f"{', '.join(REQUIRED)}; to run without one: unset {' '.join(REQUIRED)}"
    )
