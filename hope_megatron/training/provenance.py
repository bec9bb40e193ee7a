"""Where a run comes from: commit and versions, stored with the run and with every checkpoint."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import hope_megatron
from hope_megatron.config.environment import DISTRIBUTIONS, installed_versions
from hope_megatron.ops.memory.backends.registry import chosen_kernels
from hope_megatron.runtime.git import git


def provenance() -> dict[str, Any]:
    """Commit of the source tree (None when installed without one), whether it has changes, versions of what computes, and the
    kernels that the memories run on: a list that grows while they are chosen, at the first step."""
    return {
        **_source(Path(hope_megatron.__file__).resolve().parents[1]),
        "versions": {
            **installed_versions((*DISTRIBUTIONS, "triton", "webdataset")),
            "hope_megatron": hope_megatron.__version__,
            "python": platform.python_version(),
        },
        "platform": platform.platform(),
        "memory_kernels": chosen_kernels,
    }


def _source(root: Path) -> dict[str, Any]:
    """Commit and whether there are changes: from git, or from what launch/freeze.py wrote beside a frozen copy."""
    frozen = root / "source.json"
    if frozen.is_file():
        written = json.loads(frozen.read_text(encoding="utf-8"))
        return {"commit": written.get("commit"), "uncommitted_changes": bool(written.get("uncommitted"))}
    status = git(root, "status", "--porcelain", "--untracked-files=no", timeout_s=20.0)
    commit = git(root, "rev-parse", "HEAD", timeout_s=20.0)
    return {
        "commit": commit.strip() if commit is not None else None,
        "uncommitted_changes": bool(status.strip()) if status is not None else None,
    }
