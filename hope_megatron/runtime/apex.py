"""NVIDIA's apex, told from PyPI's web toolkit of the same name by what it provides, without importing either."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

EXTENSIONS = {
    "fused norms": "fused_layer_norm_cuda",
    "multi-tensor kernels": "amp_C",
    "fused weight gradient": "fused_weight_gradient_mlp_cuda",
}
"""Compiled kernel families, and the module that each is."""


@dataclass(frozen=True, kw_only=True)
class Apex:
    """What is behind the module name `apex`."""

    kind: str
    """absent, nvidia, or other."""
    location: str | None = None
    provides: Mapping[str, bool] = field(default_factory=dict)
    """For NVIDIA's: whether each compiled kernel family is there (it can be installed without any)."""

    def describe(self) -> str:
        """One sentence for a report."""
        if self.kind == "absent":
            return "not installed (it is not on PyPI; the package named apex there is not NVIDIA's)"
        if self.kind == "other":
            return (
                f"{self.location} is not NVIDIA's apex but another package of that name, probably PyPI's web toolkit "
                "of 2013; nothing here uses it: pip uninstall apex"
            )
        kernels = (
            ", ".join(name for name, there in self.provides.items() if there)
            or "no compiled kernels (built without them)"
        )
        return f"NVIDIA's, at {self.location}: {kernels}"

    def lacks(self, family: str) -> str | None:
        """Why a kernel family cannot be had, None if it is there."""
        if self.kind == "absent":
            return "NVIDIA's apex is not installed"
        if self.kind == "other":
            return f"{self.location} is not NVIDIA's apex"
        return None if self.provides[family] else f"this apex was built without {EXTENSIONS[family]}"


def detect_apex() -> Apex:
    """Tell NVIDIA's apex from PyPI's web toolkit of the same name by what it provides."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Apex(kind="absent")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    location = str(folders[0]) if folders else str(spec.origin)
    marks = ("normalization/fused_layer_norm.py", "multi_tensor_apply")
    if not any(all((folder / mark).exists() for mark in marks) for folder in folders):
        return Apex(kind="other", location=location)
    provides = {family: importlib.util.find_spec(module) is not None for family, module in EXTENSIONS.items()}
    return Apex(kind="nvidia", location=location, provides=provides)
