"""Commands that write, on a disk that is full or fills meanwhile: one line, exit code 2, nothing half left."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hope_megatron.cli.main import main
from hope_megatron.testing.disks import full_disk

COMMANDS: dict[str, list[str]] = {
    "hf": ["export", "hf", "RUN", "OUT"],
    "torch_dist": ["export", "torch_dist", "RUN", "OUT"],
    "deepspeed": ["export", "deepspeed", "RUN", "OUT"],
    "deepspeed native": ["export", "deepspeed", "RUN", "OUT", "--tp", "1", "--dp", "1", "--zero-stage", "1"],
    "reshard": ["checkpoint", "reshard", "RUN", "OUT", "--tp", "1"],
    "average": ["checkpoint", "average", "RUN@40", "RUN@40", "OUT"],
    "weights": ["checkpoint", "weights", "RUN", "OUT"],
    "import checkpoint": ["import", "deepspeed", "EXPORT", "--checkpoint", "OUT"],
    "import model": ["import", "hf", "EXPORT", "--model", "OUT"],
    "import tokenizer": ["import", "hf", "EXPORT", "--tokenizer", "OUT"],
    "state": ["generate", "RUN", "--prompt", "def", "--max-new-tokens", "2", "--state", "OUT"],
    "memory": ["eval", "memory", "RUN", "--text", "TEXT", "--max-tokens", "64", "--json", "OUT", "--png", "OUT.png"],
    "report": ["report", "RUN", "--out", "OUT"],
    "tune": ["plan", "hope_tiny", "--tune", "--out", "OUT"],
    "tokenizer": ["data", "tokenizer", "TEXT", "--vocab-size", "280", "--out", "OUT"],
}


PATHS = {"RUN": "run", "OUT": "out/file", "EXPORT": "export", "TEXT": "text.txt"}


@pytest.mark.parametrize("limit", [0, 40], ids=["full", "fills"])
@pytest.mark.parametrize("name", COMMANDS)
def test_one_line_and_nothing_half_left(
    name: str, limit: int, make_checkpoint: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint()
    (tmp_path / "text.txt").write_text("".join(f"def function_{i}(argument): return {i}\n" for i in range(400)))
    here = {word: str(tmp_path / path) for word, path in PATHS.items()}
    argv = [re.sub("RUN|OUT|EXPORT|TEXT", lambda found: here[found[0]], word) for word in COMMANDS[name]]
    if "EXPORT" in COMMANDS[name]:
        assert main(["export", COMMANDS[name][1], here["RUN"], here["EXPORT"]]) == 0
    (tmp_path / "out").mkdir()
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    with full_disk(limit):
        code = main(argv)
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in captured.err, captured
    assert sorted(tmp_path.rglob("*")) == before
