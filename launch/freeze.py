"""The code of a run, frozen when it is submitted: editing the checkout does not change a queued job.

The packages are copied to RUN/launch/code/DIGEST, named by the digest of their content; `source.json` beside it says which
commit they come from, and `changes.patch` what differed from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from hope_megatron.runtime.files import write_text
from hope_megatron.runtime.git import git
from launch.errors import LaunchError

PACKAGES = ("hope_megatron", "data_pipeline", "launch", "configs")
_ROOT = Path(__file__).resolve().parents[1]
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def freeze_code(code_dir: Path, root: Path = _ROOT) -> Path:
    """Copy the code into `code_dir`; returns the directory of the copy, which is reused if the code is the same.

    Args:
        code_dir: where copies lie, one directory each.
        root: directory with the packages: the checkout, or site-packages.

    Raises:
        LaunchError: if the copy cannot be written.
    """
    digest = _digest(root)[:16]
    target = code_dir / digest
    if target.is_dir():
        return target
    temporary = code_dir / f".{digest}.{os.getpid()}.tmp"
    try:
        for package in PACKAGES:
            if (root / package).is_dir():
                shutil.copytree(root / package, temporary / package, ignore=_LEFT_OUT)
        source = _source(root)
        (temporary / "changes.patch").write_text(source.pop("changes"), encoding="utf-8")
        write_text(
            temporary / "source.json", json.dumps({"root": str(root), "digest": digest, **source}, indent=1) + "\n"
        )
        os.rename(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise LaunchError(
            f"cannot copy the code to {target}: {error.strerror}; check space and permissions of the run directory"
        ) from None
    return target


def _digest(root: Path) -> str:
    """SHA-256 over names and contents of all files of the packages."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for folder, folders, files in os.walk(root / package):
            folders[:] = sorted(name for name in folders if name not in _LEFT_OUT(folder, folders))
            for name in sorted(set(files) - _LEFT_OUT(folder, files)):
                path = Path(folder) / name
                digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _source(root: Path) -> dict[str, Any]:
    """Commit of the checkout and what differs from it; None and nothing where there is no git."""
    commit = git(root, "rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "uncommitted": [], "changes": ""}
    status = git(root, "status", "--porcelain", "--", *PACKAGES) or ""
    changes = git(root, "diff", "HEAD", "--", *PACKAGES) or ""
    return {"commit": commit.strip(), "uncommitted": [line[3:] for line in status.splitlines()], "changes": changes}
