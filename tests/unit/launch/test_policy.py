"""What follows from failures, on a clock of its own: simulated days of attempts in milliseconds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hope_megatron.runtime.failures import CRASH, TRANSIENT, USER
from launch.attempts import CRASHED, STOPPED, History
from launch.policy import MAX_DELAY_S, judge


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "attempts.jsonl")


def fail(
    history: History, kind: str, furthest: int, *, step: int = 0, signature: str = "", nodes: tuple[str, ...] = ()
) -> None:
    history.start("7", 0, ["node1", "node2"], step)
    history.end(CRASHED, "why", step, list(nodes), kind=kind, furthest=furthest, signature=signature)


def test_a_users_mistake_stops_at_once(history: History) -> None:
    fail(history, USER, 0)
    assert judge(history, 3, 20).stop == "why"


def test_the_same_error_at_the_same_step_stops_the_second_time(history: History) -> None:
    fail(history, CRASH, 40, signature="KeyError at x.py:3")
    assert not judge(history, 3, 20).stop
    fail(history, CRASH, 40, signature="KeyError at x.py:3")
    assert "the same error came at the same step" in judge(history, 3, 20).stop


def test_other_errors_stop_after_k_without_coming_further(history: History) -> None:
    fail(history, CRASH, 40, signature="a")
    for number in range(3):
        fail(history, CRASH, 30 + number, signature=f"b{number}")
        assert not judge(history, 3, 20).stop
    fail(history, CRASH, 39, signature="c")
    assert "4 attempts failed without coming further (max_restarts=3)" in judge(history, 3, 20).stop


def test_faults_that_may_pass_have_more_patience_and_pauses_grow(history: History) -> None:
    delays = []
    for _ in range(20):
        fail(history, TRANSIENT, 0)
        verdict = judge(history, 3, 20)
        assert not verdict.stop
        delays.append(verdict.delay_s)
    assert delays[:4] == [1, 2, 4, 8] and max(delays) == delays[-1] == MAX_DELAY_S
    fail(history, TRANSIENT, 0)
    assert "21 attempts failed" in judge(history, 3, 20).stop


def test_stopping_is_no_failure_and_a_person_starts_counting_afresh(history: History) -> None:
    fail(history, CRASH, 40, signature="a")
    history.start("7", 0, ["node1"], 0)
    history.end(STOPPED, "time limit", 44)
    assert not judge(history, 0, 0).stop
    fail(history, USER, 44)
    history.give_up("why")
    history.submitted()
    read = History(history.path)
    assert read.given_up == "" and read.fruitless() == []
    fail(read, CRASH, 3, step=44, signature="a")
    assert not judge(read, 3, 20).stop, "an error before the new submission is not the same error again"


def test_a_day_of_faults_needs_no_person(tmp_path: Path) -> None:
    """24 h of a large job by a fake clock: a fault every 10 minutes on average, checkpoints every 5, three bad nodes in a pool."""
    rng, clock, position, checkpoint, attempts = random.Random(7), 0.0, 0.0, 0, 0
    history = History(tmp_path / "attempts.jsonl")
    history.submitted()
    healthy = [f"n{i}" for i in range(20)]
    weak = {"n3", "n5", "n7"}
    while clock < 86400:
        avoided = set(history.avoided_nodes(2))
        nodes = [node for node in healthy if node not in avoided][:8]
        assert len(nodes) == 8
        begun, attempts = position, attempts + 1
        history.start("7", 0, nodes, checkpoint)
        bad = [node for node in nodes if node in weak]
        runs_for = rng.expovariate(1 / 120) if bad else rng.expovariate(1 / 600)
        clock += 30 + runs_for
        reached = checkpoint + runs_for
        checkpoint = max(checkpoint, int(reached // 300) * 300)
        position = max(position, reached)
        blamed = [rng.choice(bad)] if bad and rng.random() < 0.8 else [rng.choice(nodes)] if rng.random() < 0.02 else []
        history.end(CRASHED, "killed", checkpoint, blamed, kind=TRANSIENT, furthest=int(reached))
        verdict = judge(history, 3, 20)
        assert not verdict.stop, (attempts, begun, verdict)
        clock += verdict.delay_s
    assert attempts > 80 and checkpoint > 0.4 * clock
    assert weak <= set(history.avoided_nodes(2)), "a node that failed twice is left out"
    assert History(history.path).attempts == history.attempts
