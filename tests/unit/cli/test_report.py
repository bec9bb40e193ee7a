"""`hope report`: one page that needs nothing beside it, from whatever a run has left."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from hope_megatron.cli.main import main
from hope_megatron.config import dump_config
from hope_megatron.config.changes import settings_entry
from hope_megatron.report.run_page import _LAYER
from hope_megatron.testing.tiny import tiny_run_config
from hope_megatron.training.history import write_history
from hope_megatron.training.ledger import RunLedger
from hope_megatron.training.metrics import MetricsFile


class Outside(HTMLParser):
    """What a page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attributes if name in ("src", "href")]
        self.found = [value for value in self.found if not value.startswith("data:")]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 6 steps that is at its fourth, with a skipped step and a changed setting."""
    config = tiny_run_config(output_dir=tmp_path)
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text(dump_config(config))
    metrics = MetricsFile(config.run_dir / "metrics.jsonl")
    for step in (1, 2, 3, 4):
        memory = {f"memory/drift/layer_0{layer}/mem": 0.1 * step * layer for layer in (1, 2)}
        speed = {"speed/tokens_per_s": 1000.0 + step, "time/wall_s": 60.0 * step}
        metrics.append(
            step, {"train/loss": 5 - step / 2, "train/tokens": 64 * step, "train/lr": 1e-3, **speed, **memory}
        )
    metrics.append(4, {"heldout/loss": 3.25, "train/tokens": 256})
    RunLedger(config.run_dir / "ledger.jsonl").record("skipped", 3, 8, 4, reason="<script>alert(1)</script>")
    write_history(config.run_dir / "history.json", config, [settings_entry(2, {"optim.lr": (0.01, 0.001)})])
    return config.run_dir


def test_the_page_shows_all_of_it_and_needs_nothing_else(run, tmp_path, capsys):
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 3, "loss, throughput, memories"
    for words in (
        "3.2500",
        "Not all steps are done",
        "4m",
        "memory/drift",
        "skipped",
        "optim.lr 0.01 -&gt; 0.001",
        "name: tiny",
    ):
        assert words in page, words
    assert "<script" not in page and "&lt;script&gt;" in page

    outside = Outside()
    outside.feed(page)
    assert outside.found == [] and not re.search(r"url\(|@import", page)


def test_a_period_that_changes_is_drawn(run, tmp_path, capsys):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"]["cms"]["levels"][1]["update_period_changes"] = [{"from_step": 2, "period": 1}]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "level 2: 2, from step 2 on 1; 3 updates so far" in page


def test_the_facts_for_programs(run, capsys):
    assert main(["report", str(run), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["step"] == 4 and facts["steps"] == 6 and facts["held-out loss"] == 3.25 and facts["tokens"] == 256
    assert not (run / "report.html").exists()


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 2
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report", str(tmp_path), "--samples", "-1"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in errors] == ["error"] * 3 and "metrics.jsonl" in errors[1]


@pytest.mark.parametrize(
    ("name", "panel", "line"),
    [
        ("memory/drift/layer_01/mem", "memory/drift", "01"),
        ("memory/eta/layer_12", "memory/eta", "12"),
        ("cms/update_norm/level_2", "cms/update_norm", None),
        ("train/loss", None, None),
    ],
)
def test_names_of_figures(name, panel, line):
    match = _LAYER.match(name)
    assert (match and match[1]) == panel and (match and match[2]) == line
