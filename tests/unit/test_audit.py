"""`make audit` calls nothing harmless that nobody was asked about."""

from __future__ import annotations

import importlib.util
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "audit.py"
CLEAN = {"name": "six", "version": "1.17.0", "vulns": []}
WEAK = {
    "name": "a",
    "version": "1.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"], "aliases": [], "description": ""}],
}
SKIPPED = {"name": "b", "skip_reason": "Dependency not found on PyPI and could not be audited: b (2.0)"}


def test_the_report_is_judged_by_what_was_asked() -> None:
    spec = importlib.util.spec_from_file_location("audit", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.judge({"dependencies": [CLEAN]}) == ([], [], "")
    assert tool.judge({"dependencies": [CLEAN, WEAK, SKIPPED]}) == (["a 1.0: PYSEC-1, mended in 1.1"], ["b"], "")
    assert "no advisories" in tool.judge({"dependencies": [SKIPPED]})[2], "a mirror's silence is no audit"
