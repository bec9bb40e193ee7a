"""The examples run, and learn."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize(
    "options", [[], ["--mixer", "memory", "--optimizer", "muon"], ["--optimizer", "adamw", "--lr", "0.1"]]
)
def test_char_gpt_learns(options: list[str]) -> None:
    spec = importlib.util.spec_from_file_location("char_gpt", EXAMPLES / "char_gpt.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss = module.main(["--steps", "24", "--dim", "32", "--block", "32", "--layers", "1", *options])
    letters = len(set((EXAMPLES / "char_gpt.py").read_text(encoding="utf-8")))
    assert loss < math.log(letters) - 0.4, "below the loss of guessing"
