"""The curves are drawn from metrics.jsonl."""

from __future__ import annotations

import struct

from hope_megatron.training.metrics import MetricsFile
from hope_megatron.training.plots import _smooth, plot_curves


def test_png_is_written_whole(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 60):
        metrics = {"train/loss": 6 - step / 20, "train/lr": 1e-3, "train/tokens": 1000 * step}
        file.append(step, metrics | ({"heldout/loss": 6.1 - step / 20} if step % 10 == 0 else {}))
    assert plot_curves(file.path, tmp_path / "curves.png", title="a run", references={"bigram": 4.2})
    data = (tmp_path / "curves.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    assert struct.unpack(">II", data[16:24]) == (1200, 900)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_nothing_to_draw(tmp_path):
    assert not plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", title="a run")
    assert not (tmp_path / "curves.png").exists()


def test_smoothing_keeps_straight_lines_and_ends():
    line = [(float(x), 2.0 * x) for x in range(200)]
    assert all(abs(y - 2.0 * x) < 1e-9 for x, y in _smooth(line))
