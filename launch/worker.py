"""What srun starts for each rank: turns Slurm's variables into those of torch, and becomes `python -m hope_megatron`."""

from __future__ import annotations

import os
import signal
import sys


def rank_environment(slurm: dict[str, str]) -> dict[str, str]:
    """Rank variables from Slurm's. Tasks of a node are neighbours, so tensor-parallel groups stay inside a node."""
    return {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": slurm["SLURM_STEP_TASKS_PER_NODE"].partition("(")[0],
    }


def main() -> None:
    """Become the command in sys.argv."""
    # A stop request that comes before training listens for it must not kill this process; the supervisor repeats it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.environ.update(rank_environment(dict(os.environ)))
    os.execv(sys.executable, [sys.executable, "-m", "hope_megatron", *sys.argv[1:]])


if __name__ == "__main__":
    main()
