"""Every block of commands or Python of the pages is executed by a test that its mark names, or the mark says why not."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from data_pipeline import train_tokenizer
from data_pipeline.prepare import prepare
from hope_megatron.cli.main import main

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HERE = Path(__file__).relative_to(ROOT).as_posix()
EXTENDING = "tests/integration/test_extending.py"
"""Executes docs/extending.md, whose marks say where each block goes."""

_MARK = re.compile(
    r"<!-- (?:executed by (?P<test>\S+)|not executed: (?P<why>.+)|(?P<part>run|write: .+|insert: .+)) -->"
)
_FENCE = re.compile(r"\s*```(\w*)")


class Block(NamedTuple):
    """What a reader would type."""

    page: Path
    line: int
    mark: str
    """The line before it that is not blank."""
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """Fenced blocks of a shell or of Python, and indented ones that begin with a command."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number, mark = 0, ""
    while number < len(lines):
        line, start = lines[number], number
        fence = _FENCE.match(line)
        if fence:
            number = next(end for end in range(start + 1, len(lines)) if _FENCE.match(lines[end]))
            if fence[1] in ("bash", "sh", "python"):
                yield Block(page, start + 1, mark, "\n".join(lines[start + 1 : number]))
        elif re.match(r"    (hope|python|make|pip) ", line):
            while number + 1 < len(lines) and lines[number + 1].startswith("    "):
                number += 1
            yield Block(page, start + 1, mark, "\n".join(lines[start : number + 1]))
        mark = lines[number].strip() or mark
        number += 1


ALL = [block for page in PAGES for block in blocks(page)]
OURS = [block for block in ALL if f"executed by {HERE}" in block.mark]


def name_of(block: Block) -> str:
    return f"{block.page.name}:{block.line}"


@pytest.mark.parametrize("block", ALL, ids=name_of)
def test_every_block_is_executed_or_says_why_not(block: Block) -> None:
    mark = _MARK.fullmatch(block.mark)
    assert mark, f"no mark before the block, but {block.mark!r}"
    if mark["why"]:
        assert len(mark["why"].split()) >= 3
        return
    test = ROOT / (mark["test"] or EXTENDING)
    assert (test.suffix in (".py", ".sh") and block.page.name in test.read_text(encoding="utf-8")) or mark[
        "test"
    ] == HERE


@pytest.mark.parametrize("block", [block for block in OURS if "hope " in block.text], ids=name_of)
def test_commands_end_well(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "hope" and main(words[1:]) == 0, line


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/stdlib in a directory: of this project's text, to be quick."""
    root = tmp_path_factory.mktemp("blocks")
    text = root / "text.txt"
    text.write_text("".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "data_pipeline").glob("*.py"))))
    tokenizer = train_tokenizer([text.read_text()[:100_000]], root / "tokenizer.model", 400)
    prepare([ROOT / "data_pipeline"], tokenizer, root / "data/stdlib", held_out_fraction=0.1, workers=1)
    return root


@pytest.mark.parametrize("block", [block for block in OURS if "import " in block.text], ids=name_of)
def test_python_runs(block: Block, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(prepared)
    names: dict = {}
    exec(compile(block.text, str(block.page), "exec"), names)
    assert names["sample"].shape == (2049,) if "sample" in names else names["document"]["tokens"].ndim == 1


def test_blocks_are_found() -> None:
    assert len(ALL) > 60 and len(OURS) > 6
