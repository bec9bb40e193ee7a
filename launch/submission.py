"""What was submitted for a run, kept in the run directory, and where the launcher keeps its files.

    RUN/launch/
      submission.json   this record
      config.yaml       the resolved configuration that the ranks read
      cluster.yaml      the resolved cluster file
      job.sbatch        the batch script as submitted
      job.log           output of the job, appended over all its restarts
      attempts.jsonl    every start of the ranks and how it ended (launch/attempts.py)
      health.json       the last check of the nodes
      reports/          what the ranks of the current attempt report (hope_megatron/runtime/reports.py)
      code/DIGEST/      the code that the job runs (launch/freeze.py)

Standard library only: the supervisor reads it on the node, outside of any container.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hope_megatron.runtime.files import write_json
from hope_megatron.runtime.records import read_object
from launch.errors import LaunchError


class LaunchDirectory:
    """Paths of the launcher's files in a run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.path = run_dir / "launch"
        self.submission = self.path / "submission.json"
        self.config = self.path / "config.yaml"
        self.cluster = self.path / "cluster.yaml"
        self.script = self.path / "job.sbatch"
        self.log = self.path / "job.log"
        self.attempts = self.path / "attempts.jsonl"
        self.health = self.path / "health.json"
        self.reports = self.path / "reports"
        self.code = self.path / "code"


@dataclass(frozen=True)
class Submission:
    """How a run is to be run; all that the supervisor needs."""

    name: str
    steps: int
    """Optimizer steps after which the run is complete."""
    nodes: int
    ranks_per_node: int
    cpus_per_process: int
    gpus_per_node: int
    code: str
    """Directory of the frozen code."""
    python: str
    srun_options: tuple[str, ...] = ()
    """More options of every srun: the container, and those of the cluster file."""
    prefix: tuple[str, ...] = ()
    """What stands before the command of every srun: a container of apptainer."""
    scratch: str = "/tmp"
    max_restarts: int = 3
    max_transient_restarts: int = 20
    max_node_failures: int = 2
    leave_out_slow_nodes: bool = False
    master_ports: tuple[int, int] | None = None
    health: dict[str, Any] | None = None
    """Thresholds of the node check (HealthConfig); None leaves the check away."""
    job_id: str | None = None
    """Slurm's id of the job, `ID_INDEX` for a cell of an array; None until it is queued."""
    job_ids_before: tuple[str, ...] = field(default=())
    """Ids of earlier submissions of the same run."""

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.ranks_per_node


def write_submission(directory: LaunchDirectory, submission: Submission) -> None:
    """Write the record."""
    write_json(directory.submission, asdict(submission))


def read_submission(run_dir: Path) -> Submission:
    """Read the record of a run.

    Raises:
        LaunchError: if the directory is not that of a launched run.
    """
    path = LaunchDirectory(run_dir).submission
    if not path.exists():
        raise LaunchError(
            f"{run_dir} has no {path.relative_to(run_dir)}; give the directory of a run that `hope launch` submitted"
        )
    known = {item.name for item in fields(Submission)}
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in (read_object(path) or {}).items()
        if key in known
    }
    try:
        return Submission(**values)
    except TypeError:
        raise LaunchError(
            f"{path} is damaged: it is not the record of a run; submit the run again with "
            "`hope launch CONFIG --cluster ...`"
        ) from None
