"""The process of a run that never trains: it starts the ranks, watches them, and decides what follows.

    python -m launch.supervisor RUN_DIR     what the batch script of a job starts

What it does is in launch/attempt_runner.py, for Slurm in launch/slurm_job.py; `hope train` does the same on this machine
(launch/local.py). Standard library only, so that it can run outside of the container in which the ranks run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launch.slurm_job import SlurmJob


def main() -> int:
    """`python -m launch.supervisor RUN_DIR`"""
    return SlurmJob(Path(sys.argv[1]).resolve()).run()


if __name__ == "__main__":
    sys.exit(main())
