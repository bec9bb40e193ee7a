"""What docs/library.md and the README's first lines of Python show runs."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hope_megatron.checkpoint.find import CheckpointSource

ROOT = Path(__file__).parents[3]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_library_page(make_checkpoint: Callable[..., CheckpointSource], tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="HopeForCausalLM is a transformers model")
    make_checkpoint()
    text = tmp_path / "text.py"
    text.write_text("def main(argument):\n    return argument\n" * 8)
    names: dict = {"RUN": str(tmp_path / "run"), "TEXT": str(text)}
    torch.manual_seed(0)
    found = blocks("docs/library.md")
    assert len(found) == 7
    for block in found:
        exec(compile(block, "docs/library.md", "exec"), names)
    assert names["rest"].shape == (2, 40, 64) and names["score"] > 0 and len(names["texts"]) == 2


def test_five_lines_of_the_readme_learn(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("README.md")
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    first, *_, last = map(float, capsys.readouterr().out.split())
    assert last < 0.5 * first


def test_api_page_is_what_the_docstrings_say() -> None:
    pytest.importorskip("transformers", reason="HopeForCausalLM is a transformers model")
    spec = importlib.util.spec_from_file_location("make_api_docs", ROOT / "tools/make_api_docs.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = tool.page()
    assert "## hope_megatron.NeuralMemory\n" in text and "## hope_megatron.optim.M3\n" in text
    assert (ROOT / "docs/api.md").read_text(encoding="utf-8") == text, "run python tools/make_api_docs.py"
