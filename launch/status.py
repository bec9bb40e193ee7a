"""What a run is doing, from its directory and from Slurm's queue. Needs no accounting database, and no Slurm for finished runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hope_megatron.runtime.formatting import duration_text
from hope_megatron.runtime.process import start_up_text
from hope_megatron.runtime.records import read_object
from launch.attempts import CRASHED, LOST, UNHEALTHY, History, is_finished, last_record, newest_checkpoint_step
from launch.goodput import real_goodput
from launch.jobs import active_job
from launch.stragglers import slow_rank
from launch.submission import LaunchDirectory, read_submission
from launch.watchdog import is_alive

_CHECK_JOB_S = 30.0


@dataclass(frozen=True)
class Status:
    """A run at this moment."""

    name: str
    state: str
    """finished, gave up, running, pending, ..., or how the last attempt ended."""
    detail: str
    """Why, where or since when."""
    job_id: str
    step: int
    steps: int
    tokens_per_s: float | None
    """Of the latest record."""
    eta_s: float | None
    """Seconds of training that are left at that speed, while it runs."""
    checkpoint: int
    """Step of the newest checkpoint."""
    start_up: str
    """How long the latest start took, by phase; empty before its first step."""
    attempts: int
    restarts: int
    """Attempts after a failure."""
    goodput: str
    """Shares of the run's life: productive, saves, lost, queued; empty before there are any."""
    slow: str
    """The rank that the latest comparison found slow; empty if there is none."""
    avoided_nodes: tuple[str, ...]
    mlflow_run: str | None
    log: str

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {self.state}" + (f" ({self.detail})" if self.detail else ""),
            f"  job         {self.job_id}",
            f"  step        {self.step:,} of {self.steps:,}; newest checkpoint at {self.checkpoint:,}",
        ]
        if self.tokens_per_s is not None:
            left = f", {duration_text(self.eta_s)} left" if self.eta_s is not None else ""
            lines.append(f"  speed       {self.tokens_per_s:,.0f} tokens/s{left}")
        lines.append(f"  attempts    {self.attempts}, {self.restarts} after failures")
        if self.goodput:
            lines.append(f"  goodput     {self.goodput}")
        if self.start_up:
            lines.append(f"  start-up    {self.start_up}")
        if self.slow:
            lines.append(f"  slow        {self.slow}")
        if self.avoided_nodes:
            lines.append(f"  avoids      {' '.join(self.avoided_nodes)}")
        if self.mlflow_run:
            lines.append(f"  MLflow run  {self.mlflow_run}")
        return "\n".join([*lines, f"  log         {self.log}"])


def run_status(run_dir: Path) -> Status:
    """State of a launched run.

    Raises:
        LaunchError: if the directory is not that of a launched run.
        SlurmError: if the run has not finished and Slurm cannot be asked.
    """
    directory = LaunchDirectory(run_dir)
    submission, history = read_submission(run_dir), History(directory.attempts)
    latest = last_record(run_dir)
    tracking = _json(run_dir / "tracking.json")
    step, tokens_per_s = int(latest.get("step", 0)), latest.get("speed/tokens_per_s")
    state, detail = _state(directory, history, submission.steps)
    eta = None
    if state == "running" and tokens_per_s and step:
        eta = (submission.steps - step) * latest["train/tokens"] / step / tokens_per_s
    return Status(
        name=submission.name,
        state=state,
        detail=detail,
        job_id=submission.job_id or "-",
        step=step,
        steps=submission.steps,
        tokens_per_s=tokens_per_s,
        eta_s=eta,
        checkpoint=newest_checkpoint_step(run_dir),
        start_up=start_up_text(phases) if (phases := _json(run_dir / "start_up.json").get("phases_s")) else "",
        attempts=len(history.attempts),
        restarts=sum(attempt.outcome in (CRASHED, LOST) for attempt in history.attempts[:-1]),
        goodput=str(goodput) if (goodput := real_goodput(run_dir, history)) is not None else "",
        slow=str(slow) if (slow := slow_rank(run_dir)) is not None else "",
        avoided_nodes=tuple(history.avoided_nodes(submission.max_node_failures)),
        mlflow_run=tracking.get("run_id") and f"{tracking['run_id']} at {tracking.get('uri')}",
        log=str(directory.log if directory.log.exists() or submission.job_id else run_dir / "train.log"),
    )


def _state(directory: LaunchDirectory, history: History, steps: int) -> tuple[str, str]:
    """(state, detail)"""
    if is_finished(directory.run_dir, steps):
        return "finished", ""
    if history.given_up:
        return "gave up", history.given_up
    job = active_job(directory)
    if job is not None and job.state == "PENDING":
        expected = "" if job.start_time == "Unknown" else f", expected to start {job.start_time}"
        return "pending", job.reason + expected
    if job is not None:
        return job.state.lower(), f"on {job.nodes}"
    if history.attempts and history.attempts[-1].ended is None and _is_supervised_here(history.attempts[-1].job_id):
        return "running", f"on {' '.join(history.attempts[-1].nodes)}"
    if not history.attempts:
        return "ended", "the job ended before it began training; see the log"
    last = history.attempts[-1]
    state = {CRASHED: "failed", UNHEALTHY: "failed", LOST: "cut off"}.get(last.outcome, last.outcome)
    return state, f"{last.reason}; {_go_on(directory)} goes on".removeprefix("; ")


def _go_on(directory: LaunchDirectory) -> str:
    if read_submission(directory.run_dir).job_id is None:
        return "the same `hope train` command"
    return f"`hope launch resume {directory.run_dir}`"


def _is_supervised_here(job_id: str) -> bool:
    """Whether the supervisor of a run on this machine still lives."""
    kind, _, pid = job_id.partition("-")
    return kind == "local" and pid.isdecimal() and is_alive(int(pid))


def follow_log(run_dir: Path, *, lines: int, follow: bool) -> Iterator[str]:
    """The last lines of the job's log, then what is added, until the run has no job any more.

    Raises:
        LaunchError: if the directory is not that of a launched run.
    """
    directory = LaunchDirectory(run_dir)
    read_submission(run_dir)
    if not directory.log.exists():
        if not follow:
            yield f"{directory.log} does not exist yet: the job has not started\n"
            return
        while not directory.log.exists():
            time.sleep(1.0)
    with open(directory.log, encoding="utf-8", errors="replace") as file:
        yield from file.readlines()[-lines:]
        checked = time.monotonic()
        while follow:
            if line := file.readline():
                yield line
                continue
            if time.monotonic() - checked > _CHECK_JOB_S:
                if active_job(directory) is None:
                    return
                checked = time.monotonic()
            time.sleep(0.5)


def _json(path: Path) -> dict[str, Any]:
    return read_object(path) or {}
