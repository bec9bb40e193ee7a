"""What docs/checkpoints.md says is tested, is."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")
CLAIMS, LIST = PAGE.split("\n## Tests\n")


def test_every_letter_is_a_test_that_exists() -> None:
    rows = dict(re.findall(r"^\| ([a-z]) \| (.*) \|$", LIST, re.MULTILINE))
    letters = {letter for group in re.findall(r"\[([a-z](?: [a-z])*)\]", CLAIMS) for letter in group.split()}
    assert letters == set(rows)
    for row in rows.values():
        file = ""
        for path, name in re.findall(r"`([\w/.]*)::(\w+)`", row):
            file = path or file
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_every_cell_has_a_test() -> None:
    table = CLAIMS.split("## What goes where")[1].split("\n\n")[1]
    _, _, *rows = table.splitlines()
    for row in rows:
        name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        for cell in cells:
            assert cell in ("", "–", "DeepSpeed, below") or re.search(r"\[[a-z ]+\]", cell), f"{name}: {cell}"
