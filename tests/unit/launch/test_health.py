"""The judgement over the nodes: every node has two partners, and the blame falls on the bad one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from launch.health import blame, judge_local, judge_pairs, rounds
from launch.node_check import scratch_problems

HEALTH = {"max_clock_skew_s": 5.0}


def names(count: int) -> list[str]:
    return [f"n{i}" for i in range(count)]


@pytest.mark.parametrize("count", range(1, 10))
def test_rounds_give_each_node_one_partner_at_a_time(count: int) -> None:
    plan = rounds(names(count))
    for paired in plan:
        assert len({node for pair in paired for node in pair}) == sum(len(pair) for pair in paired)
    partners = Counter(node for paired in plan for pair in paired for node in pair)
    assert partners == dict.fromkeys(names(count), 1 if count < 3 else 2)
    assert len({frozenset(pair) for paired in plan for pair in paired}) == sum(map(len, plan))


@pytest.mark.parametrize("count", range(3, 10))
@pytest.mark.parametrize("bad", [["n0"], ["n1"], ["n2"]])
def test_a_bad_node_is_named_alone(count: int, bad: list[str]) -> None:
    pairs = [pair for paired in rounds(names(count)) for pair in paired]
    failed = {pair: "hangs" for pair in pairs if set(pair) & set(bad)}
    assert list(blame(pairs, failed)) == bad


def test_two_bad_neighbours_are_both_named() -> None:
    pairs = [pair for paired in rounds(names(6)) for pair in paired]
    failed = {pair: "hangs" for pair in pairs if set(pair) & {"n2", "n3"}}
    assert sorted(blame(pairs, failed)) == ["n2", "n3"]


def test_a_bad_link_costs_one_node() -> None:
    pairs = [pair for paired in rounds(names(4)) for pair in paired]
    assert len(blame(pairs, {pairs[0]: "slow"})) == 1


def test_silence_and_complaints_are_problems() -> None:
    well = {"problems": []}
    reports = {"n0": [well, well], "n1": [well], "n2": [well, {"problems": ["3 GPUs seen, 4 expected"]}]}
    problems = judge_local(reports, ranks_per_node=2)
    assert problems == {"n1": "1 of 2 ranks did not answer", "n2": "3 GPUs seen, 4 expected"}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"problems": [], "time": 100.0}, None),
        ({"problems": [], "time": 106.0}, "clocks differ by 6.0 s"),
        ({"problems": ["the all-reduce gave a wrong sum"], "time": 100.0}, "wrong sum"),
        (None, "did not end"),
    ],
)
def test_pairs_are_judged_by_result_clock_and_answer(answer: dict | None, words: str | None) -> None:
    reports = {"n0": [{"problems": [], "time": 100.0}], "n1": [answer] if answer else []}
    failed = judge_pairs([("n0", "n1")], reports, 1, HEALTH)
    assert (words is None and not failed) or (words is not None and words in failed["n0", "n1"])


def test_scratch_is_written_and_measured(tmp_path: Path) -> None:
    assert scratch_problems(tmp_path, 0.0) == []
    assert list(tmp_path.iterdir()) == []
    assert "free, less than" in scratch_problems(tmp_path, 1e9)[0]
    assert "cannot be written" in scratch_problems(tmp_path / "missing", 0.0)[0]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"problems": ["the all-reduce gave a wrong sum"], "time": 100.0}, "the all-reduce gave a wrong sum"),
        ({"problems": ["0.1 GB/s, less than 10"], "time": 100.0}, "0.1 GB/s, less than 10"),
        ({"problems": [], "time": 109.0}, "clocks differ by 9.0 s"),
        (None, "the all-reduce did not end"),
    ],
)
def test_each_fault_is_put_down_to_its_node(bad: dict | None, words: str) -> None:
    pairs = [pair for paired in rounds(names(4)) for pair in paired]
    answers = {node: [{"problems": [], "time": 100.0}] for node in names(4)} | {"n2": [bad] if bad else []}
    problems = blame(pairs, judge_pairs(pairs, answers, 1, HEALTH))
    assert list(problems) == ["n2"] and words in problems["n2"]
