"""What is installed, found without importing any of it: a broken package must not break the one who asks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

DISTRIBUTIONS = (
    "hope_megatron",
    "torch",
    "megatron-core",
    "deepspeed",
    "sentencepiece",
    "mlflow",
    "safetensors",
    "pydantic",
    "numpy",
)
"""Distributions that a run needs, and whose versions are stored with it."""


def installed_versions(names: tuple[str, ...] = DISTRIBUTIONS) -> dict[str, str | None]:
    """Version of each distribution, None where it is not installed."""
    return {name: _version(name) for name in names}


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
    return Apex(
        kind="nvidia",
        location=location,
        provides={
            "fused norms": _importable("fused_layer_norm_cuda"),
            "multi-tensor kernels": _importable("amp_C"),
            "fused weight gradient": _importable("fused_weight_gradient_mlp_cuda"),
        },
    )


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A source of fused kernels: what is there, and what becomes of it."""

    name: str
    available: bool
    in_use: bool
    why: str


def fused_kernels(*, cuda: bool) -> list[Kernel]:
    """Optional sources of fused kernels, whether this version uses them, and why not.

    Args:
        cuda: whether there is a CUDA device; all but PyTorch need one.
    """
    apex = detect_apex()
    unused = "no part of this version calls it"
    if not cuda:
        unused += ", and there is no CUDA device"
    torch = Kernel(
        name="PyTorch",
        available=_importable("torch"),
        in_use=True,
        why="norms, attention (scaled_dot_product_attention) and optimizer updates are its own operators; "
        "the row `memory kernel` says what computes memories",
    )
    rows = [
        torch,
        Kernel(name="NVIDIA apex", available=apex.kind == "nvidia", in_use=False, why=f"{apex.describe()}; {unused}"),
    ]
    for name, distribution, module in (
        ("Transformer Engine", "transformer-engine", "transformer_engine"),
        ("flash-linear-attention", "flash-linear-attention", "fla"),
    ):
        available = _importable(module)
        found = (_version(distribution) or "version unknown") if available else "not installed"
        rows.append(Kernel(name=name, available=available, in_use=False, why=f"{found}; {unused}"))
    available = _importable("triton")
    found = (_version("triton") or "version unknown") if available else "not installed"
    use = (
        "model.memory.kernel=auto takes its kernels where they were found right" if cuda else "there is no CUDA device"
    )
    rows.append(Kernel(name="Triton", available=available, in_use=available and cuda, why=f"{found}; {use}"))
    return rows


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
