"""Questions to git, answered with None where there is no checkout, no git, or no answer in time."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git(root: Path, *arguments: str, timeout_s: float = 60.0) -> str | None:
    """What `git -C ROOT ARGUMENTS` prints; None if it fails."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
