"""Slurm's own commands, called with argument lists and time limits, and what they answer. Works without accounting.

Standard library only: the supervisor of a job uses this module on the node, outside of any container.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 60.0
_TRIES = 4
_TRANSIENT = (
    "unable to contact slurm controller",
    "socket timed out",
    "connection refused",
    "try again",
    "temporarily",
)

ENDED_STATES = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)


class SlurmError(Exception):
    """Slurm refused or could not be asked. The message has Slurm's own words."""

    is_user_error = True


@dataclass(frozen=True)
class Job:
    """A job as the controller knows it."""

    job_id: str
    state: str
    """PENDING, RUNNING, COMPLETING, CANCELLED, ..."""
    reason: str
    """Why it is pending, or how it ended; empty when there is nothing to say."""
    nodes: str
    """Compressed node list, empty while pending."""
    restarts: int
    start_time: str
    """When it started, or is expected to; `Unknown` when Slurm cannot tell."""
    log: str
    """Where its output goes."""

    @property
    def ended(self) -> bool:
        """Whether it will not run again by itself."""
        return self.state in ENDED_STATES


def require_slurm() -> None:
    """Refuse to go on without Slurm.

    Raises:
        SlurmError: if sbatch is not in PATH.
    """
    if shutil.which("sbatch") is None:
        raise SlurmError(
            "sbatch is not in PATH; run this on a login node of the cluster, or use --local for this machine"
        )


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """Queue a batch script; returns the job id."""
    return _call(["sbatch", "--parsable", *options, str(script)], clean=True).split(";")[0].strip()


def would_accept(script: Path, options: Sequence[str] = ()) -> str:
    """Ask Slurm to judge a batch script without queueing it; returns its words (the expected start).

    Raises:
        SlurmError: with the reason, if Slurm would refuse it.
    """
    done = _execute(["sbatch", "--test-only", *options, str(script)], clean=True)
    text = done.stderr.strip().removeprefix("sbatch: ")
    if done.returncode:
        raise SlurmError(text.removeprefix("allocation failure: "))
    return text


def find_job(job_id: str) -> Job | None:
    """A job, or None when the controller has forgotten it (minutes after its end)."""
    done = _execute(["scontrol", "show", "job", "--oneliner", job_id])
    if done.returncode:
        if "invalid job id" in done.stderr.lower():
            return None
        raise SlurmError(f"scontrol show job {job_id}: {done.stderr.strip()}")
    return parse_job(done.stdout.splitlines()[0])


def parse_job(line: str) -> Job:
    """A line of `scontrol show job --oneliner`."""
    values = parse_fields(line)
    index = values.get("ArrayTaskId", "")
    job_id = f"{values['ArrayJobId']}_{index}" if index.isdecimal() else values["JobId"]
    return Job(
        job_id=job_id,
        state=values["JobState"],
        reason=_value(values, "Reason"),
        nodes=_value(values, "NodeList"),
        restarts=int(values.get("Restarts", 0)),
        start_time=values.get("StartTime", "Unknown"),
        log=values.get("StdOut", ""),
    )


def parse_fields(line: str) -> dict[str, str]:
    """`Key=value` pairs of a line; values end at the next space (none that we read contains one)."""
    return dict(re.findall(r"(\w+)=(\S*)", line))


def _value(values: Mapping[str, str], key: str) -> str:
    value = values.get(key, "")
    return "" if value in ("(null)", "None") else value


def hostnames(node_list: str) -> list[str]:
    """`node[1-2]` as [`node1`, `node2`]."""
    return _call(["scontrol", "show", "hostnames", node_list]).split() if node_list else []


def show_nodes(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """What the controller knows of each node."""
    lines = _call(["scontrol", "show", "node", "--oneliner", ",".join(names)]).splitlines()
    return {values["NodeName"]: values for values in map(parse_fields, lines) if "NodeName" in values}


def show_partition(name: str | None) -> dict[str, str] | None:
    """Limits of a partition (of the default one for None), or None if it does not exist."""
    lines = _call(["scontrol", "show", "partition", "--oneliner"]).splitlines()
    partitions = [parse_fields(line) for line in lines if line]
    for values in partitions:
        if values["PartitionName"] == name or (name is None and values.get("Default") == "YES"):
            return values
    return None


def partition_names() -> list[str]:
    """Names of all partitions."""
    return sorted({line.strip() for line in _call(["sinfo", "--noheader", "--format=%R"]).splitlines() if line.strip()})


def interrupt(job_id: str) -> None:
    """Ask the supervisor of a running job to save and end it: SIGINT to the batch process only."""
    _scancel("--batch", "--signal=INT", job_id)


def cancel(job_id: str) -> None:
    """End a job: SIGTERM to all its processes, SIGKILL after the cluster's KillWait."""
    _scancel(job_id)


def requeue(job_id: str, exclude: Sequence[str] = ()) -> None:
    """Put a running job back into the queue under its id, without the nodes of `exclude`.

    The list of excluded nodes can only be changed while a job is pending, hence the hold.
    """
    if not exclude:
        _call(["scontrol", "requeue", job_id])
        return
    _call(["scontrol", "requeuehold", job_id])
    try:
        _call(["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(exclude)}"])
    finally:
        _call(["scontrol", "release", job_id])


def _scancel(*arguments: str) -> None:
    done = _execute(["scancel", *arguments])
    # Its exit code is 0 also when it could not do what it was asked to.
    if done.returncode or "error:" in done.stderr:
        raise SlurmError(f"scancel {' '.join(arguments)}: {done.stderr.strip()}")


def _call(command: list[str], *, clean: bool = False) -> str:
    done = _execute(command, clean=clean)
    if done.returncode:
        raise SlurmError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _execute(command: list[str], *, clean: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command; try again while the controller is away for a moment.

    Args:
        clean: hide SBATCH_* and SLURM_* settings of this shell, which would override the script.
    """
    environment = dict(os.environ)
    if clean:
        kept = {"SLURM_CONF", "SLURM_CLUSTERS"}
        environment = {k: v for k, v in environment.items() if k in kept or not k.startswith(("SBATCH_", "SLURM_"))}
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(2.0**attempt)
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            continue
        except OSError as error:
            raise SlurmError(f"{command[0]} cannot be run: {error.strerror}; is Slurm installed here?") from None
        if done.returncode == 0 or not any(words in done.stderr.lower() for words in _TRANSIENT):
            return done
    raise SlurmError(
        f"{' '.join(command)}: Slurm's controller did not answer {_TRIES} times; try again later, or ask with `scontrol ping`"
    )
