"""The stories of docs/stories.md run as far as a machine without a GPU allows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STORIES = Path(__file__).parents[1] / "stories"
NAMES = sorted(path.stem for path in STORIES.glob("*.sh") if path.stem != "common")


@pytest.mark.parametrize("name", NAMES)
def test_story(name: str, tmp_path: Path) -> None:
    root = STORIES.parents[1]
    environment = {**os.environ, "STORY_DIR": str(tmp_path), "STORY_PYTHON": sys.executable, "PYTHONPATH": str(root)}
    script = ["bash", str(STORIES / f"{name}.sh")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_page_names_every_story() -> None:
    page = (STORIES.parents[1] / "docs" / "stories.md").read_text(encoding="utf-8")
    assert len(NAMES) == 5 and all(f"`{name}.sh`" in page for name in NAMES)
