"""What srun starts for each rank: turns Slurm's variables into those of torch, and becomes `python -m hope_megatron`.

The first rank of a node also starts the watchdog of that node.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from hope_megatron.runtime.failures import ATTEMPT_VARIABLE, LAUNCH_DIR_VARIABLE
from hope_megatron.runtime.heartbeat import HEARTBEAT_DIR_VARIABLE, Limits


def rank_environment(slurm: dict[str, str]) -> dict[str, str]:
    """Rank variables from Slurm's. Tasks of a node are neighbours, so tensor-parallel groups stay inside a node."""
    return {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": slurm["SLURM_STEP_TASKS_PER_NODE"].partition("(")[0],
    }


def heartbeat_directory(environment: dict[str, str]) -> Path:
    """Where the ranks of this node and attempt keep their heartbeats: in memory where there is /dev/shm."""
    memory = Path("/dev/shm")
    base = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    return base / f"hope-{os.getuid()}-{environment[ATTEMPT_VARIABLE]}-{environment.get('SLURMD_NODENAME', 'node')}"


def start_watchdog(beats: Path, environment: dict[str, str]) -> None:
    """Start the watchdog of this node; it ends with the ranks."""
    beats.mkdir(mode=0o700, exist_ok=True)
    ranks, reports = environment["LOCAL_WORLD_SIZE"], environment[LAUNCH_DIR_VARIABLE]
    arguments = [str(beats), reports, environment.get("SLURMD_NODENAME", "node"), ranks]
    arguments += [environment.get("SLURM_STEP_NUM_NODES", "1"), str(Limits().start_up_s)]
    subprocess.Popen([sys.executable, "-m", "launch.watchdog", *arguments], stdin=subprocess.DEVNULL)


def main() -> None:
    """Become the command in sys.argv."""
    # A stop request that comes before training listens for it must not kill this process; the supervisor repeats it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.environ.update(rank_environment(dict(os.environ)))
    if LAUNCH_DIR_VARIABLE in os.environ:
        beats = heartbeat_directory(dict(os.environ))
        os.environ[HEARTBEAT_DIR_VARIABLE] = str(beats)
        if os.environ["LOCAL_RANK"] == "0":
            start_watchdog(beats, dict(os.environ))
    os.execv(sys.executable, [sys.executable, "-m", "hope_megatron", *sys.argv[1:]])


if __name__ == "__main__":
    main()
