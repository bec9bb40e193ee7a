"""Runs on a real cluster that is unkind to them. The oracle: the bits of an undisturbed run, and every sample exactly once."""

from __future__ import annotations

import json
import socket
import sqlite3
import time

import pytest
import yaml
from local_slurm import LocalSlurm
from runs import BATCH, STEPS, Run, Workspace


@pytest.fixture(scope="module")
def reference(workspace: Workspace) -> Run:
    """An undisturbed run on two nodes, as the middle of a chain that first makes the data."""
    data, runs = workspace.directory / "data", workspace.directory / "runs"
    tokenizer, text = data / "tokenizer.model", workspace.directory / "text.jsonl"
    links = [
        {"name": "tokenizer", "run": ["data", "tokenizer", str(text), "--vocab-size", "400", "--out", str(tokenizer)]},
        {
            "name": "data",
            "run": [
                "data",
                "prepare",
                str(text),
                "--tokenizer",
                str(tokenizer),
                "--out",
                str(data),
                "--held-out",
                "0.1",
            ],
        },
        {"name": "train", "config": str(workspace.run_file), "overrides": ["name=reference"], "nodes": 2},
        {
            "name": "evaluate",
            "run": ["eval", str(runs / "reference"), "--max-tokens", "128", "--json", str(runs / "eval.json")],
        },
        {"name": "export", "run": ["export", "hf", str(runs / "reference"), str(runs / "exported")]},
    ]
    chain = workspace.directory / "chain.yaml"
    chain.write_text(yaml.safe_dump({"name": "chain", "output_dir": str(workspace.directory), "links": links}))
    cluster = workspace.write_cluster("checked.yaml", health={"min_free_scratch_gb": 0.01})
    workspace.hope("launch", "chain", chain, "--cluster", cluster)
    run = Run(workspace, runs / "reference")
    assert run.wait_for_end() == "COMPLETED", run.log
    return run


def test_chain_runs_link_after_link(reference: Run, workspace: Workspace) -> None:
    chain = workspace.directory / "chain"
    reference.wait(lambda: workspace.hope("launch", "status", chain).count("completed") == 5, "five completed links")
    assert (workspace.directory / "runs" / "exported" / "hope_digests.json").is_file()
    assert "the nodes are well" in reference.log
    assert [samples for _, samples, _ in reference.trajectory()] == [BATCH * (i + 1) for i in range(STEPS)]
    status = workspace.hope("launch", "status", reference.directory)
    assert "finished" in status and f"step        {STEPS} of {STEPS}" in status
    assert "goodput     productive" in status
    logs = workspace.hope("launch", "logs", reference.directory, "--lines", 3).splitlines()
    assert len(logs) == 3 and f"finished: all {STEPS} steps are done" in logs[-1]


def test_failed_link_cancels_what_follows(reference: Run, workspace: Workspace) -> None:
    links = [
        {
            "name": "data",
            "run": ["data", "prepare", "no/such/file.txt", "--tokenizer", "none.model", "--out", "nowhere"],
        },
        {"name": "train", "config": str(workspace.run_file), "overrides": ["name=never"]},
        {"name": "convert", "run": ["export", "hf", "nowhere", "out"]},
    ]
    chain = workspace.directory / "broken.yaml"
    chain.write_text(yaml.safe_dump({"name": "broken", "output_dir": str(workspace.directory), "links": links}))
    workspace.hope("launch", "chain", chain, "--cluster", workspace.cluster_file)
    directory = workspace.directory / "broken"
    reference.wait(
        lambda: workspace.hope("launch", "status", directory).count("because data failed") == 2, "two cancelled links"
    )
    assert not (workspace.directory / "runs" / "never" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "nodes", "words"),
    [
        ({"partition": "mian"}, 2, "did you mean main"),
        ({"time_limit": "02:00:00"}, 2, "allows 01:00:00"),
        ({}, 4, "has 3 nodes"),
        ({"cpus_per_process": 64}, 2, "sbatch --test-only"),
    ],
)
def test_preflight_asks_slurm(reference: Run, workspace: Workspace, changes: dict, nodes: int, words: str) -> None:
    cluster = workspace.write_cluster("wrong.yaml", **changes)
    arguments = ["--cluster", cluster, "--nodes", nodes, "name=refused"]
    output = workspace.hope("launch", workspace.run_file, *arguments, code=2)
    assert words in output and "nothing was submitted" in output


@pytest.mark.timeout(600)
def test_many_faults_end_in_the_same_bits(reference: Run, workspace: Workspace, slurm: LocalSlurm) -> None:
    run = workspace.submit("survivor", "--nodes", 2)

    run.wait_for_step(2)
    with run.held():
        slurm.run("scancel", "--batch", "--signal=USR1", run.job_id)  # what the time limit sends
        run.wait_for_log("asking the ranks to save and stop")
    run.wait_for_log("the ranks have stopped")
    stopped_at = run.attempts()[-1]["last_step"]
    assert stopped_at == run.step(), "a step was lost"

    run.wait_for_step(stopped_at + 1)
    with run.held():
        node_of_rank_1 = run.nodes()[1]
        run.kill_rank(1)
    run.wait_for_log("attempt 2 failed")

    run.wait_for_log("all ranks are ready", times=3)
    with run.held():
        slurm.kill_node(node_of_rank_1)
        slurm.start_node(node_of_rank_1)
    run.wait_for_log(f"avoiding {node_of_rank_1}")  # it failed twice

    run.wait_for_log("all ranks are ready", times=4)
    assert node_of_rank_1 not in run.nodes()
    preempt = ["sbatch", "--parsable", "--partition=urgent", "--exclusive", "--nodes=3", "--output=/dev/null"]
    with run.held():
        urgent = slurm.run(*preempt, "--wrap=true").strip()
        run.wait_for_log("asking the ranks to save and stop", times=2)
    run.wait_for_log("the ranks have stopped", times=2)

    run.wait_for_log("all ranks are ready", times=5)
    assert "JobState=COMPLETED" in slurm.run("scontrol", "show", "job", urgent)
    with run.held():
        slurm.run("scontrol", "requeue", run.job_id)
    assert run.wait_for_end() == "COMPLETED", run.log
    assert run.log.count("all ranks are ready") == 6, "a fault came when all steps were done"

    assert run.trajectory() == reference.trajectory()
    assert len(reference.final_state()) > 20
    assert run.final_state() == reference.final_state()
    assert one_mlflow_run(workspace, "survivor") == [*range(1, STEPS + 1)]
    slurm.run("scontrol", "requeue", run.job_id)  # a stray requeue
    run.wait_for_log("nothing to do")
    assert run.wait_for_end() == "COMPLETED"
    assert run.final_state() == reference.final_state()


@pytest.mark.timeout(600)
def test_node_that_stays_dead_is_left_out(reference: Run, workspace: Workspace, slurm: LocalSlurm) -> None:
    """It fails for the second time by dying, and nobody repairs it: Slurm itself notices, and puts the job elsewhere."""
    run = workspace.submit("bereaved", "--nodes", 2)
    run.wait_for_log("all ranks are ready")
    with run.held():
        victim = run.nodes()[1]
        run.kill_rank(1)
    run.wait_for_log("all ranks are ready", times=2)
    with run.held():
        slurm.kill_node(victim)

    run.wait_for_log("all ranks are ready", times=3)
    assert victim not in run.nodes()
    assert [attempt["bad_nodes"] for attempt in run.attempts()[:2]] == [[victim], [victim]]
    assert f"{victim} went down" in run.attempts()[1]["reason"]
    assert f"avoids      {victim}" in workspace.hope("launch", "status", run.directory)
    assert run.wait_for_end() == "COMPLETED", run.log
    assert run.trajectory() == reference.trajectory()
    assert run.final_state() == reference.final_state()
    slurm.start_node(victim)
    slurm.wait_idle()


@pytest.mark.timeout(600)
def test_time_limit_requeues_without_losing_a_step(reference: Run, workspace: Workspace) -> None:
    # Slurm looks at its clock every 30 s, and sends the signal up to that much too early.
    cluster = workspace.write_cluster("short.yaml", time_limit="00:02:00", stop_before_end_s=30)
    endless = ["training.steps=100000", "checkpoint.every=100000"]
    run = workspace.submit("limited", *endless, cluster=cluster)
    run.wait_for_log("all ranks are ready")
    started = time.monotonic()

    run.wait_for_log("the ranks have stopped")
    assert time.monotonic() - started < 120, "Slurm's limit came first"
    assert "time limit or preemption: asking the ranks to save and stop" in run.log
    (attempt,) = run.attempts()
    assert attempt["outcome"] == "stopped" and attempt["last_step"] == run.step() > 0, "a step was lost"
    run.wait_for_step(attempt["last_step"] + 1)
    assert "restart 1" in run.log and f"from step {attempt['last_step']}, port" in run.log
    steps = [step for step, _, _ in run.trajectory()]
    assert steps == [*range(1, steps[-1] + 1)]
    status = workspace.hope("launch", "status", run.directory)
    assert "running" in status and "start-up " in status and "imports" in status

    run.wait_for_step(steps[-1] + 1)
    workspace.hope("launch", "cancel", run.directory, "--now")  # scancel: Slurm terminates the ranks, which save
    assert run.wait_for_end() == "CANCELLED"
    run.wait(lambda: len(run.attempts()) == 2, "the end of the second attempt")
    assert run.attempts()[1]["last_step"] == run.step(), f"scancel lost a step\n{run.log}"


@pytest.mark.timeout(600)
def test_a_time_limit_ends_in_the_same_bits(reference: Run, workspace: Workspace) -> None:
    cluster = workspace.write_cluster("short.yaml", time_limit="00:02:00", stop_before_end_s=30)
    run = workspace.submit("interrupted", "--nodes", 2, cluster=cluster)
    run.wait_for_step(5)
    with run.held():
        run.wait_for_log("time limit or preemption: asking the ranks to save and stop")
    assert run.wait_for_end() == "COMPLETED", run.log
    assert [attempt["outcome"] for attempt in run.attempts()] == ["stopped", "finished"]
    assert run.trajectory() == reference.trajectory()
    assert run.final_state() == reference.final_state()


def test_array_cells_share_a_node_and_one_resumes_elsewhere(
    reference: Run, workspace: Workspace, slurm: LocalSlurm
) -> None:
    cluster = workspace.write_cluster("shared.yaml", exclusive=False)
    arguments = ["--cluster", cluster, "--vary", "optim.lr=0.003,0.001", "--limit", 2, "name=array"]
    workspace.hope("launch", "array", workspace.run_file, *arguments)
    cells = [Run(workspace, workspace.directory / "runs" / "array" / f"array-{i}") for i in range(2)]
    cells[0].wait_for_step(1)
    with cells[0].held():
        assert "already queued as job" in workspace.hope("launch", "resume", cells[0].directory, code=2)
        workspace.hope("launch", "cancel", cells[0].directory)
    assert cells[0].wait_for_end() == "CANCELLED"
    assert cells[1].wait_for_end() == "COMPLETED", cells[1].log
    assert 0 < cells[0].attempts()[0]["last_step"] == cells[0].step() < STEPS, (
        "cancelling lost a step, or came too late"
    )
    assert all(len(cell.attempts()) == 1 for cell in cells), "each has a port of its own"

    workspace.hope("launch", "resume", cells[0].directory, "--nodes", 2)  # elastic: it began on one
    assert cells[0].wait_for_end() == "COMPLETED", cells[0].log
    assert "2 ranks" in cells[0].log
    steps, samples, losses = zip(*cells[0].trajectory(), strict=True)
    expected_steps, expected_samples, expected_losses = zip(*reference.trajectory(), strict=True)
    assert (steps, samples) == (expected_steps, expected_samples)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert "finished" in workspace.hope("launch", "status", workspace.directory / "runs" / "array")


def test_crash_loop_stops(reference: Run, workspace: Workspace) -> None:
    """An error that comes again at its step; ordered in the cluster file's env, which travels in a file of its own."""
    cluster = workspace.write_cluster("faulty.yaml", env={"HOPE_FAULTS": "raise@0:2:forward*"})
    run = workspace.submit("loop", "resilience.allow_faults=true", cluster=cluster)
    assert run.wait_for_end() == "FAILED"
    assert "giving up: the same error came at the same step in two attempts: rank 0 on" in run.log
    assert "HOPE_FAULTS" in (run.directory / "launch" / "job.sbatch").read_text()
    assert "raise@0:2" not in (run.directory / "launch" / "job.sbatch").read_text()
    assert (run.directory / "launch" / "environment.sh").stat().st_mode & 0o077 == 0
    assert "gave up" in workspace.hope("launch", "status", run.directory)


@pytest.mark.timeout(400)
def test_a_hanging_rank_is_found_on_a_cluster(reference: Run, workspace: Workspace) -> None:
    cluster = workspace.write_cluster("hanging.yaml", env={"HOPE_FAULTS": "stop@1:5:forward"})
    settings = ["resilience.allow_faults=true", "resilience.hang.min_s=6", "resilience.hang.first_step_s=60"]
    run = workspace.submit("hanging", "--nodes", 2, *settings, cluster=cluster)
    assert run.wait_for_end() == "COMPLETED", run.log
    first, second = run.attempts()
    (node,) = first["bad_nodes"]
    assert f"rank 1 on {node} hangs at step 5: stopped by a signal, in phase forward" in first["reason"]
    assert second["outcome"] == "finished"
    stacks = sorted((run.directory / "launch" / "hangs" / "attempt-0001").glob("stack-rank-*.txt"))
    assert len(stacks) == 2 and all("most recent call first" in path.read_text() for path in stacks)
    assert run.trajectory() == reference.trajectory() and run.final_state() == reference.final_state()


def test_a_slow_node_is_named_and_left_out(reference: Run, workspace: Workspace, slurm: LocalSlurm) -> None:
    changes = {"env": {"HOPE_FAULTS": "slow@1:1"}, "leave_out_slow_nodes": True}
    cluster = workspace.write_cluster("slow.yaml", **changes)
    endless = ["training.steps=100000", "checkpoint.every=100000", "resilience.allow_faults=true"]
    run = workspace.submit("slow", "--nodes", 2, *endless, cluster=cluster)
    run.wait_for_step(76)  # three comparisons
    victim = run.nodes()[1]
    status = workspace.hope("launch", "status", run.directory)
    assert "slow        rank 1" in status and "in the last 3 comparisons" in status
    slurm.run("scancel", "--batch", "--signal=USR1", run.job_id)  # what the time limit sends
    run.wait_for_log(f"leaving out {victim}, which was slow to the end")
    run.wait_for_log("all ranks are ready", times=2)
    assert victim not in run.nodes()
    assert f"avoids      {victim}" in workspace.hope("launch", "status", run.directory)
    workspace.hope("launch", "cancel", run.directory, "--now")
    assert run.wait_for_end() == "CANCELLED"


def test_bad_node_and_taken_port_are_left_out(reference: Run, workspace: Workspace, slurm: LocalSlurm) -> None:
    scratch = workspace.directory / "scratch"
    scratch.mkdir()
    slurm.kill_node("node1")
    slurm.start_node("node1", prepare=f"mount -t tmpfs -o size=1m none {scratch}")
    slurm.wait_idle()
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        cluster = workspace.write_cluster(
            "scratch.yaml", scratch=str(scratch), health={"min_free_scratch_gb": 0.01}, master_ports=[port, port + 1]
        )
        run = workspace.submit("elsewhere", "training.steps=1", "optim.warmup_steps=0", cluster=cluster)
        assert run.wait_for_end() == "COMPLETED", run.log
    assert f"node1: {scratch} has 0.0 GB free" in run.log
    assert run.attempts()[0]["bad_nodes"] == ["node1"]
    assert f"port {port + 1}\n" in run.log
    status = workspace.hope("launch", "status", run.directory)
    assert "finished" in status and "avoids      node1" in status


def one_mlflow_run(workspace: Workspace, name: str) -> list[int]:
    """Steps at which the only MLflow run of a name has a loss."""
    run_id = json.loads((workspace.directory / "runs" / name / "tracking.json").read_text())["run_id"]
    with sqlite3.connect(workspace.directory / "runs" / "mlflow.db") as database:
        assert database.execute("select run_uuid from runs where name = ?", (name,)).fetchall() == [(run_id,)]
        query = "select step from metrics where run_uuid = ? and key = 'train/loss' order by step"
        return [step for (step,) in database.execute(query, (run_id,))]
