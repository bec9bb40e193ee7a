"""Where this user's machine keeps what is made once: compiled kernels, and whether kernels were found right."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/hope_megatron`, or the same under `~/.cache`. It may not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "hope_megatron"
