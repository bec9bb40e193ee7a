"""metrics.jsonl survives crashes and restarts."""

from __future__ import annotations

from hope_megatron.training.metrics import MetricsFile, read_metrics, read_metrics_from


def test_records_after_the_resumed_step_are_dropped(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 5, 10, 15):
        file.append(step, {"train/loss": 1.0 / step})
    assert file.drop_after(10) == 1
    file.append(15, {"train/loss": 0.5})
    assert [(r["step"], r["train/loss"]) for r in read_metrics(file.path)] == [(1, 1.0), (5, 0.2), (10, 0.1), (15, 0.5)]


def test_line_cut_short_by_a_crash_is_dropped(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(1, {"train/loss": 2.0})
    with open(file.path, "a") as handle:
        handle.write('{"step": 2, "train/lo')
    assert [r["step"] for r in read_metrics(file.path)] == [1]
    assert file.drop_after(10) == 1
    file.append(2, {"train/loss": 1.0})
    assert [r["step"] for r in read_metrics(file.path)] == [1, 2]


def test_reader_continues_where_it_stopped(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(1, {})
    records, offset = read_metrics_from(file.path, 0)
    file.append(2, {})
    assert [r["step"] for r in records] == [1]
    assert [r["step"] for r in read_metrics_from(file.path, offset)[0]] == [2]


def test_nothing_there_yet(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert MetricsFile(tmp_path / "metrics.jsonl").drop_after(0) == 0
