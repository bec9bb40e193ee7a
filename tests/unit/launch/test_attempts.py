"""The history of attempts: when to give up, which nodes to avoid; it survives a writer that dies in the middle of a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.attempts import CRASHED, LOST, STOPPED, UNHEALTHY, History, is_finished, newest_checkpoint_step


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "attempts.jsonl")


def attempt(history: History, start: int, end: int, outcome: str, bad_nodes: list[str] | None = None) -> None:
    history.start("7", 0, ["node1", "node2"], start)
    history.end(outcome, "reason", end, bad_nodes)


def test_failures_count_only_without_progress(history: History) -> None:
    attempt(history, 0, 0, CRASHED)
    attempt(history, 0, 10, CRASHED)
    assert history.fruitless() == [], "the second attempt left a newer checkpoint"
    attempt(history, 10, 10, CRASHED)
    attempt(history, 10, 10, STOPPED)
    attempt(history, 10, 10, LOST)
    assert [a.number for a in history.fruitless()] == [3, 5], "stopping is not a failure"


def test_steps_before_the_first_checkpoint_are_progress(history: History) -> None:
    for furthest in (40, 90, 130):
        history.start("7", 0, ["node1"], 0)
        history.end(CRASHED, "killed", 0, kind="transient", furthest=furthest)
    assert history.fruitless() == []
    history.start("7", 0, ["node1"], 0)
    history.end(CRASHED, "killed", 0, kind="transient", furthest=130)
    assert [a.number for a in history.fruitless()] == [4]


def test_submission_starts_afresh_but_remembers_nodes(history: History) -> None:
    attempt(history, 0, 0, CRASHED, ["node2"])
    attempt(history, 0, 0, CRASHED, ["node2"])
    history.give_up("why")
    assert History(history.path).given_up == "why"
    history.submitted()
    assert history.fruitless() == []
    assert history.given_up == ""
    assert history.avoided_nodes(2) == ["node2"]


def test_nodes_are_avoided_after_two_failures_or_a_failed_check(history: History) -> None:
    attempt(history, 0, 0, CRASHED, ["node1"])
    assert history.avoided_nodes(2) == []
    attempt(history, 0, 0, UNHEALTHY, ["node2"])
    assert history.avoided_nodes(2) == ["node2"]
    assert history.unhealthy_in_a_row() == 1
    attempt(history, 0, 5, LOST, ["node1"])
    assert history.avoided_nodes(2) == ["node1", "node2"]
    assert history.unhealthy_in_a_row() == 0


def test_an_attempt_without_end_is_lost_and_can_be_closed_later(history: History) -> None:
    attempt(history, 0, 5, STOPPED)
    history.start("7", 1, ["node1"], 5)
    read = History(history.path)
    assert read.attempts == history.attempts
    assert (read.attempts[1].outcome, read.attempts[1].ended) == (LOST, None)
    read.end(LOST, "node1 went down", 5, ["node1"])
    assert History(history.path).attempts[1].bad_nodes == ("node1",)


def test_a_line_cut_short_costs_nothing_else(history: History) -> None:
    attempt(history, 0, 5, STOPPED)
    with open(history.path, "a") as file:
        file.write('\n{"event": "sta')
    read = History(history.path)
    read.start("8", 0, ["node3"], 5)
    assert [entry.nodes for entry in History(history.path).attempts] == [("node1", "node2"), ("node3",)]


def test_only_checkpoints_with_a_manifest_count(tmp_path: Path) -> None:
    assert newest_checkpoint_step(tmp_path) == 0
    for step in (5, 10):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000005" / "manifest.json").touch()
    assert newest_checkpoint_step(tmp_path) == 5


def test_finished_is_what_the_summary_says(tmp_path: Path) -> None:
    assert not is_finished(tmp_path, 10)
    (tmp_path / "summary.json").write_text(json.dumps({"complete": True, "step": 10}))
    assert is_finished(tmp_path, 10)
    assert not is_finished(tmp_path, 20), "training.steps was raised"
    (tmp_path / "summary.json").write_text(json.dumps({"complete": False, "step": 10}))
    assert not is_finished(tmp_path, 10)
