"""Reports can be read back, and never hold a number that is none."""

from __future__ import annotations

import json
import math
from pathlib import Path

from hope_megatron.eval.report import markdown_table, plot_losses
from hope_megatron.runtime.files import write_json


def test_json_reads_back_and_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    write_json(path, {"loss": 3.25, "bad": math.nan, "steps": [1, math.inf], "at": tmp_path})
    assert json.loads(path.read_text()) == {"loss": 3.25, "bad": None, "steps": [1, None], "at": str(tmp_path)}
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_markdown_table_is_aligned() -> None:
    table = markdown_table(
        ["model", "loss"], [["unigram", 5.5], ["HOPE", None], ["tokens", 12345], ["d", 2e-6], ["ok", True]]
    )
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["5.5000", "-", "12,345", "2.0e-06", "yes"]


def test_chart_is_a_png(tmp_path: Path) -> None:
    plot_losses(tmp_path / "losses.png", {"unigram": 5.5, "bigram": 4.2, "HOPE": 3.1}, "Held-out loss")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [p.name for p in tmp_path.iterdir()] == ["losses.png"]
