"""Which torch an environment holds, read from its files: a login node must not import it, and may not be able to."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

MIN_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
"""Oldest NVIDIA driver for each major version of CUDA (NVIDIA's CUDA compatibility guide, minor version compatibility)."""


class TorchBuild(NamedTuple):
    """A torch, and what it was built for."""

    version: str
    cuda: str | None
    hip: str | None

    @property
    def is_cpu(self) -> bool:
        """Whether it can use no GPU at all."""
        return self.cuda is None and self.hip is None


def torch_of(prefix: Path) -> TorchBuild | None:
    """The torch in a virtual environment; None if there is none to be seen."""
    for path in sorted(prefix.glob("lib/python3*/site-packages/torch/version.py")):
        found: dict[str, str | None] = {}
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue
        for node in tree.body:
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            for target in targets:
                if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant):  # type: ignore[attr-defined]
                    found[target.id] = node.value.value  # type: ignore[attr-defined]
        if isinstance(version := found.get("__version__"), str):
            return TorchBuild(version, found.get("cuda"), found.get("hip"))
    return None


def driver_problem(cuda: str, driver: str) -> str | None:
    """Why an NVIDIA driver cannot run a build of torch; None if it can, or nothing is known of that CUDA.

    Args:
        cuda: CUDA version of the build, `13.0`.
        driver: version of the driver, `580.82.07`.
    """
    try:
        major, found = int(cuda.split(".")[0]), tuple(int(part) for part in driver.split(".")[:2])
    except ValueError:
        return None
    needed = MIN_DRIVER.get(major)
    if needed is None or found >= needed:
        return None
    return f"driver {driver} is too old for CUDA {cuda}, which needs {needed[0]}.{needed[1]} or newer"
