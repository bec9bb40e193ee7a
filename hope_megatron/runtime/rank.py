"""Being one process of a world that a launcher has started."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from hope_megatron.runtime.failures import report_failure
from hope_megatron.runtime.heartbeat import attach_heartbeat
from hope_megatron.runtime.process import apply_process_environment, die_with_parent
from hope_megatron.runtime.reports import LAUNCH_DIR_VARIABLE
from hope_megatron.runtime.world import REQUIRED, World

if TYPE_CHECKING:
    from hope_megatron.config import RunConfig


def default_processes(group: int, gpus: int) -> int:
    """Processes to start where nobody says how many: all visible GPUs in whole groups (tensor x context parallel); without GPUs
    one group."""
    return max(gpus // group, 1) * group


def be_a_rank(
    world: World, launcher: str | None, load: Callable[[], RunConfig], train: Callable[[RunConfig], object]
) -> int:
    """Read the configuration, then train."""
    with reported_failures(world):
        _say_what_is_waited_for(world, launcher)
        attach_heartbeat(world.rank)
        config = load()
        apply_process_environment(config.training.num_threads)
        train(config)
    return 0


@contextlib.contextmanager
def reported_failures(world: World) -> Iterator[None]:
    """Leave what goes wrong to the process that started this one, if it listens, and end with it."""
    die_with_parent()
    try:
        yield
    except Exception as error:
        if report_failure(world.rank, error):
            _leave(2 if getattr(error, "is_user_error", False) else 1)
        raise


def _say_what_is_waited_for(world: World, launcher: str | None) -> None:
    """Variables left over in a shell look like a launcher's: the first rank of a world then waits for peers that never come."""
    if world.rank == 0 and world.world_size > 1 and LAUNCH_DIR_VARIABLE not in os.environ:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        by = launcher or " ".join(REQUIRED)
        remedy = "" if launcher else ". Without a launcher, unset these"
        print(f"process 0 of {world.world_size}, by {by}: waiting for the others at {where}{remedy}", file=sys.stderr)


def _leave(code: int) -> None:
    """Exit at once: a peer may be waiting for this rank in a collective, and destructors would wait for it in turn."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
