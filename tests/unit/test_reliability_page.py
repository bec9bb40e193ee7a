"""Every promise of docs/reliability.md names a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_row_has_its_test() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "promise | test" not in line]
    promised = [row for row in rows if row.count("|") == 4]
    assert len(promised) >= 15
    for row in promised:
        last = row.split("|")[3]
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", last)
        assert tests or "make soak" in last, row
        for file, name in tests:
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), (file, name)
