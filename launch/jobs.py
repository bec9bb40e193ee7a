"""Submitting, resuming and cancelling runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from hope_megatron.config import RunConfig, dump_config, load_run_config
from hope_megatron.config.secrets import tracking_environment
from hope_megatron.runtime.files import write_text
from launch import slurm
from launch.attempts import History, is_finished
from launch.cluster import ClusterConfig, load_cluster
from launch.errors import LaunchError
from launch.freeze import freeze_code
from launch.options import option_words
from launch.preflight import Check, preflight, require, slurm_preflight
from launch.script import container_options, container_prefix, train_script, write_secrets
from launch.step import srun_command
from launch.submission import LaunchDirectory, Submission, read_submission, write_submission


@dataclass(frozen=True)
class Rendered:
    """A run ready to be submitted."""

    script: str
    checks: list[Check]
    submission: Submission


def load_config(config: str, overrides: Iterable[str]) -> RunConfig:
    """Load a run file; the run directory becomes absolute, since the job runs elsewhere."""
    loaded = load_run_config(config, overrides)
    return loaded.model_copy(update={"output_dir": loaded.output_dir.expanduser().absolute()})


def describe(config: RunConfig, cluster: ClusterConfig, nodes: int, code: Path) -> Submission:
    """The record of a run that is not submitted yet."""
    data = config.data
    named = [data.train, data.heldout, data.tokenizer, *data.mix_with.values(), data.cache_dir]
    paths = [config.output_dir, *(path for path in named if isinstance(path, Path)), code]
    return Submission(
        name=config.name,
        steps=config.training.steps,
        nodes=nodes,
        ranks_per_node=cluster.ranks_per_node,
        cpus_per_process=cluster.cpus_per_process,
        gpus_per_node=cluster.gpus_per_node,
        code=str(code),
        python=cluster.python,
        srun_options=(*container_options(cluster, paths), *option_words(cluster.srun)),
        prefix=tuple(container_prefix(cluster, paths)),
        scratch=str(cluster.scratch),
        max_restarts=cluster.max_restarts,
        max_transient_restarts=cluster.max_transient_restarts,
        max_node_failures=cluster.max_node_failures,
        leave_out_slow_nodes=cluster.leave_out_slow_nodes,
        master_ports=cluster.master_ports,
        health=cluster.health.model_dump() if cluster.health.enabled else None,
    )


def dry_run(config: RunConfig, cluster: ClusterConfig, nodes: int) -> Rendered:
    """Render and check a run; writes and submits nothing. Without sbatch in PATH, Slurm's limits are not checked."""
    directory = LaunchDirectory(config.run_dir)
    submission = describe(config, cluster, nodes, directory.code / "DIGEST")
    script = train_script(cluster, submission, directory)
    checks = preflight(config, cluster, nodes)
    try:
        slurm.require_slurm()
    except slurm.SlurmError:
        return Rendered(script, checks, submission)
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch", encoding="utf-8") as file:
        file.write(script)
        file.flush()
        return Rendered(script, [*checks, *slurm_preflight(cluster, nodes, Path(file.name))], submission)


def rank_command(submission: Submission) -> list[str]:
    """The srun of the ranks, with nodes that Slurm has not chosen yet."""
    nodes = [f"NODE{number + 1}" for number in range(submission.nodes)]
    command = srun_command(submission, nodes, tasks_per_node=submission.ranks_per_node)
    return [
        *command,
        "--kill-on-bad-exit=1",
        *submission.prefix,
        submission.python,
        "-m",
        "launch.worker",
        "train",
        "CONFIG",
    ]


def submit_run(
    config: RunConfig,
    cluster: ClusterConfig,
    nodes: int,
    *,
    options: tuple[str, ...] = (),
    data_exists: bool = True,
    report: Callable[[str], None] = print,
) -> Submission:
    """Check, freeze and queue a run; a run that exists already goes on from its newest checkpoint.

    Args:
        options: more options of sbatch (dependencies).
        data_exists: see `preflight`.
        report: takes lines for the user.

    Raises:
        LaunchError: if the run is queued already, has finished, or does not pass the checks.
        SlurmError: if Slurm refuses it.
    """
    slurm.require_slurm()
    directory = LaunchDirectory(config.run_dir)
    before = _refuse_second_job(directory, config.training.steps)
    checks = preflight(config, cluster, nodes, data_exists=data_exists)
    for check in checks:
        report(str(check))
    require(checks)
    directory.path.mkdir(parents=True, exist_ok=True)
    code = freeze_code(directory.code)
    submission = replace(describe(config, cluster, nodes, code), job_ids_before=before)
    write_files(config, cluster, submission, directory)
    write_text(directory.script, train_script(cluster, submission, directory))
    checks = slurm_preflight(cluster, nodes, directory.script)
    for check in checks:
        report(str(check))
    require(checks)
    return queue(directory, submission, options)


def write_files(config: RunConfig, cluster: ClusterConfig, submission: Submission, directory: LaunchDirectory) -> None:
    """Write what the job will read. A password in the tracking URI is masked there; the job has it from sbatch's environment."""
    os.environ.update(tracking_environment(config.tracking.uri))
    directory.path.mkdir(parents=True, exist_ok=True)
    write_text(directory.config, dump_config(config))
    write_text(directory.cluster, dump_config(cluster), private=bool(cluster.env))
    write_secrets(cluster, directory.path)
    write_submission(directory, submission)


def queue(directory: LaunchDirectory, submission: Submission, options: tuple[str, ...] = ()) -> Submission:
    """Hand the batch script to Slurm, and note its id for `hope launch status`."""
    History(directory.attempts).submitted()
    submission = replace(submission, job_id=slurm.submit(directory.script, options))
    write_submission(directory, submission)
    return submission


def resume_run(
    run_dir: Path, *, nodes: int | None = None, overrides: Iterable[str] = (), cluster: str | None = None
) -> Submission:
    """Submit a run again, with the current code, on as many nodes as before or on others.

    Raises:
        LaunchError: if the directory is not that of a launched run, or as for `submit_run`.
    """
    run_dir = run_dir.absolute()
    directory, before = LaunchDirectory(run_dir), read_submission(run_dir)
    config = load_config(str(directory.config), overrides)
    if config.run_dir != run_dir.resolve() and config.run_dir != run_dir:
        raise LaunchError(
            f"{directory.config} belongs to {config.run_dir}, not to {run_dir}; was the directory moved? Give output_dir=..."
        )
    return submit_run(config, load_cluster(cluster or directory.cluster), nodes or before.nodes)


def active_job(directory: LaunchDirectory) -> slurm.Job | None:
    """The run's job, if Slurm has it and it may still run."""
    try:
        submission = read_submission(directory.run_dir)
    except LaunchError:
        return None
    job = slurm.find_job(submission.job_id) if submission.job_id else None
    # Slurm may give an old id to another job after a reset.
    ours = job is not None and Path(job.log).resolve() == directory.log.resolve()
    return job if ours and job is not None and not job.ended else None


def cancel_run(run_dir: Path, *, now: bool) -> str:
    """End a run's job; returns what was done.

    Args:
        now: do not wait for a checkpoint.

    Raises:
        LaunchError: if there is nothing to cancel.
    """
    directory = LaunchDirectory(run_dir.absolute())
    read_submission(directory.run_dir)
    job = active_job(directory)
    if job is None:
        raise LaunchError(f"{run_dir} has no job in the queue")
    if now or job.state != "RUNNING":
        slurm.cancel(job.job_id)
        return f"job {job.job_id} is cancelled"
    slurm.interrupt(job.job_id)
    return f"job {job.job_id} will save, and then end; `hope launch status {run_dir}` shows it"


def _refuse_second_job(directory: LaunchDirectory, steps: int) -> tuple[str, ...]:
    """Ids of the run's earlier jobs, if it may be submitted again."""
    job = active_job(directory)
    if job is not None:
        raise LaunchError(
            f"{directory.run_dir} is already queued as job {job.job_id} ({job.state}); "
            f"`hope launch cancel {directory.run_dir}` first, or give this run another name"
        )
    if is_finished(directory.run_dir, steps):
        raise LaunchError(
            f"{directory.run_dir} has finished all {steps} steps; raise training.steps, or give this run another name"
        )
    if not directory.submission.exists():
        return ()
    before = read_submission(directory.run_dir)
    return (*before.job_ids_before, before.job_id) if before.job_id else before.job_ids_before
