"""The site's table of contents names every page, and the workflows parse."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]


def test_every_page_is_in_the_table_of_contents() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = [page for section in nav for pages in section.values() if isinstance(pages, list) for page in pages]
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_call_what_exists(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for job in content.get("jobs", {}).values():
        for step in job["steps"]:
            words = step.get("run", "").split()
            if "make" in words:
                assert f"\n{words[words.index('make') + 1]}:" in makefile
            assert all((ROOT / word).exists() for word in words if word.startswith("tools/"))
