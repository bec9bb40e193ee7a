"""Slow ranks: who is named, and when their nodes are left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from hope_megatron.runtime.records import append_record
from launch.attempts import CRASHED, STOPPED, History
from launch.stragglers import slow_nodes, slow_rank

NODES = ["node1", "node2", "node3"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path


def compare(run_dir: Path, *named: int | None, first_step: int = 25) -> None:
    """Records of comparisons, 25 steps apart, with records between them that compare nothing."""
    for i, rank in enumerate(named):
        step = first_step + 25 * i
        for record_step in (step - 5, step):
            record = {"step": record_step, "train/tokens": record_step * 8, "train/loss": 1.0}
            if record_step == step:
                record["straggler/ratio"] = 1.0 if rank is None else 1.5
                if rank is not None:
                    record["straggler/rank"] = float(rank)
            append_record(run_dir / "metrics.jsonl", record)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ([], None),
        ([None, None], None),
        ([4, 4, None], None),
        ([None, 4], (4, 1)),
        ([1, 4, 4, 4], (4, 3)),
    ],
)
def test_the_rank_of_the_latest_comparison(run_dir: Path, named: list[int | None], expected: tuple | None) -> None:
    compare(run_dir, *named)
    slow = slow_rank(run_dir)
    assert (slow and (slow.rank, slow.times)) == expected


def test_a_node_is_left_out_when_its_rank_stays_slow(run_dir: Path) -> None:
    compare(run_dir, 4, 4)
    assert slow_nodes(run_dir, 0, 2, NODES) == []
    compare(run_dir, 4, first_step=75)
    assert slow_nodes(run_dir, 0, 2, NODES) == ["node3"]
    assert slow_nodes(run_dir, 0, 8, NODES[:1]) == [], "there is no other node"
    assert slow_nodes(run_dir, 50, 2, NODES) == [], "an attempt answers for its own steps"


def test_slow_nodes_are_avoided_at_once(run_dir: Path) -> None:
    history = History(run_dir / "attempts.jsonl")
    history.start("7", 0, NODES, 0)
    history.end(CRASHED, "killed", 10, ["node1"], slow_nodes=["node3"])
    history.start("7", 1, NODES, 10)
    history.end(STOPPED, "", 20, slow_nodes=[])
    assert History(history.path).avoided_nodes(2) == ["node3"]
