"""`hope train` hurt on purpose: what hangs is found and named, what may pass is tried again, what cannot pass is said once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from hope_megatron.runtime.records import read_records
from hope_megatron.testing.drill import Drill, final_state
from launch.attempts import CRASHED, FINISHED, STOPPED, History

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Drill:
    drill = Drill(tmp_path_factory.mktemp("drill"), steps=36, every=6, hang_s=5.0)
    drill.prepare()
    return drill


@pytest.fixture(scope="module")
def undisturbed(drill: Drill) -> dict[str, str]:
    code, output = drill.run("undisturbed")
    assert code == 0, output
    return final_state(drill.run_dir("undisturbed"))


def attempts(drill: Drill, name: str) -> list:
    return History(drill.run_dir(name) / "launch" / "attempts.jsonl").attempts


def test_a_rank_that_hangs_is_found_named_and_started_again(drill: Drill, undisturbed: dict[str, str]) -> None:
    code, output = drill.run("hangs", "stop@1:9:backward,gil@0:15:forward,collective@1:21:step,hang@0:27:data")
    assert code == 0, output
    assert final_state(drill.run_dir("hangs")) == undisturbed
    found = attempts(drill, "hangs")
    assert [attempt.outcome for attempt in found] == [CRASHED] * 4 + [FINISHED]
    for attempt, rank, step, words in zip(
        found,
        (1, 0, 1, 0),
        (9, 15, 21, 27),
        ("stopped by a signal, in phase backward", "phase forward", "phase step", "phase data"),
    ):
        assert f"rank {rank} on " in attempt.reason and f"hangs at step {step}" in attempt.reason, attempt.reason
        assert words in attempt.reason and attempt.kind == "transient"
        came = drill.run_dir("hangs") / "launch" / "faults" / f"{found.index(attempt):04d}"
        assert attempt.detected - came.stat().st_mtime < 30, "limit 5 s, and what a loaded machine takes"
        kept = drill.run_dir("hangs") / "launch" / "hangs" / f"attempt-{attempt.number:04d}"
        stacks = [(kept / f"stack-rank-{number:05d}.txt").read_text() for number in range(2)]
        assert all("most recent call first" in stack for stack in stacks)
        assert "faults.py" in stacks[rank], "the stack shows where the rank stands"


def test_faults_that_pass_need_no_restart(drill: Drill, undisturbed: dict[str, str]) -> None:
    code, output = drill.run("passing", "nan@1:8,disk@0:14,inf@0:15,inf@0:22")  # the second while the disk is full
    assert code == 0, output
    assert final_state(drill.run_dir("passing")) == undisturbed
    assert len(attempts(drill, "passing")) == 1
    entries = read_records(drill.run_dir("passing") / "ledger.jsonl").records
    assert [(entry["event"], entry["step"]) for entry in entries] == [("recomputed step", step) for step in (8, 15, 22)]
    assert len(list((drill.run_dir("passing") / "launch" / "faults").iterdir())) == 4
    assert "records wait in memory" in output and "metrics.jsonl is written again" in output


def test_an_error_that_comes_again_stops_and_says_where_and_how_to_go_on(drill: Drill) -> None:
    code, output = drill.run("loop", "raise@1:9:forward*")
    assert code == 1
    assert [attempt.outcome for attempt in attempts(drill, "loop")] == [CRASHED, CRASHED]
    last = output.strip().splitlines()[-2:]
    for words in (
        "attempt 2",
        "the same error came at the same step",
        "rank 1 on",
        "step 9",
        "phase forward",
        "RuntimeError",
    ):
        assert words in last[0], last
    assert last[1].startswith("Go on with: hope train ")


def test_a_users_mistake_stops_at_once(drill: Drill) -> None:
    code, output = drill.run("mistake", "", "training.steps=4", "optim.warmup_steps=1")
    assert code == 0, output
    code, output = drill.run("mistake", "", "model.hidden_size=64", "training.steps=8")
    assert code == 2 and output.count("error:") == 1 and "Traceback" not in output
    assert "model.hidden_size: 32 in the checkpoint, 64 in this run" in output


def test_sigterm_works_while_a_rank_hangs(drill: Drill, undisturbed: dict[str, str], tmp_path: Path) -> None:
    process = drill.start("ended", "hang@1:15:forward", log=tmp_path / "log")
    marker = drill.run_dir("ended") / "launch" / "faults" / "0000"
    deadline = time.monotonic() + 200
    while not marker.exists():
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
        time.sleep(0.05)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()[-2000:]
    assert time.monotonic() - began < 40
    assert attempts(drill, "ended")[-1].outcome in (CRASHED, STOPPED)
    code, output = drill.run("ended", "hang@1:15:forward")
    assert code == 0, output
    assert final_state(drill.run_dir("ended")) == undisturbed


def test_faults_are_refused_where_nobody_asked_for_a_drill(drill: Drill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    code, output = drill.run("refused", "kill@0:3", "resilience.allow_faults=false")
    assert code == 2 and "HOPE_FAULTS is set, which breaks runs on purpose" in output
