"""A sweep as a job array: every cell is queued once, finished ones never again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from runs import TIMEOUT_S, Workspace

from data_pipeline.corpus import iterate_texts
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import train_tokenizer

DEMO = Path(__file__).parents[2] / "configs" / "sweeps" / "demo.yaml"


@pytest.fixture(scope="module")
def sweep_file(workspace: Workspace) -> Path:
    """The file of `make sweep-demo` with tiny cells, on data of its own: two families at two sizes."""
    home = workspace.directory / "sweep"
    home.mkdir()
    sources = [str(workspace.directory / "text.jsonl")]
    tokenizer = train_tokenizer(iterate_texts(sources), home / "tokenizer.model", 400)
    prepare(sources, tokenizer, home / "data", held_out_fraction=0.1)
    sweep = yaml.safe_load(DEMO.read_text())
    sweep |= {"output_dir": str(home / "sweeps"), "sizes": {"widths": [32, 64], "depths": [1, 1], "head_size": 32}}
    sweep["design"] = {"tokens": [2560]}
    sweep["base"]["training"] |= {"seq_length": 64, "eval_sequences": 2, "log_every": 1}
    sweep["base"]["data"] = {
        "train": str(home / "data/train"),
        "heldout": str(home / "data/heldout"),
        "tokenizer": str(home / "tokenizer.model"),
    }
    for family in sweep["families"].values():
        family["model.vocab_size"] = 400
    path = home / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def test_sweep_runs_as_one_array(workspace: Workspace, sweep_file: Path) -> None:
    cluster = workspace.write_cluster("sweep_cluster.yaml", exclusive=False)
    queue = ["sweep", "run", sweep_file, "--cluster", cluster, "--limit", 2]
    assert "4 cells to queue" in workspace.hope(*queue)
    assert "0 cells to queue, 4 finished, queued or set aside" in workspace.hope(*queue)
    deadline = time.monotonic() + TIMEOUT_S
    while "4 finished" not in (status := workspace.hope("sweep", "status", sweep_file)) and time.monotonic() < deadline:
        time.sleep(2)
    assert "4 finished" in status
    assert "0 cells to queue, 4 finished" in workspace.hope(*queue)
    workspace.hope("sweep", "report", sweep_file, "--bootstrap", 20)
    assert "data:image/png;base64," in (sweep_file.parent / "sweeps/demo/report.html").read_text()
