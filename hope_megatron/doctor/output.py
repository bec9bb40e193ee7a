"""What another program says."""

from __future__ import annotations

import subprocess


def output_of(command: list[str], timeout_s: float = 10.0) -> str | None:
    """First lines of a command's output, or None if it fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
