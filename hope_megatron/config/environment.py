"""What is installed, found without importing any of it: a broken package must not break the one who asks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

from hope_megatron.runtime.apex import detect_apex
from hope_megatron.runtime.libraries import Choice, Where, find_choices
from hope_megatron.runtime.step_parts import STEP_PARTS

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
class Kernel:
    """A source of fused kernels: what is there, and what becomes of it."""

    name: str
    available: bool
    in_use: bool
    why: str


def fused_kernels(*, cuda: bool) -> list[Kernel]:
    """Optional sources of fused kernels, whether a step uses them here, and why not.

    Args:
        cuda: whether there is a CUDA device; all but PyTorch need one.
    """
    apex = detect_apex()
    parts = {choice.part for choice in step_libraries(cuda=cuda) if choice.library.name == "apex"}
    use = f"computes {', '.join(sorted(parts))}" if parts else "computes nothing here; see the parts of a step"
    torch = Kernel(
        name="PyTorch",
        available=_importable("torch"),
        in_use=True,
        why="computes what no other library does; the row `memory kernel` says what computes memories",
    )
    rows = [torch]
    rows.append(
        Kernel(
            name="NVIDIA apex",
            available=apex.kind == "nvidia",
            in_use=bool(parts),
            why=f"{apex.describe()}; {use}" if apex.kind == "nvidia" else apex.describe(),
        )
    )
    unused = "no part of this version calls it" + ("" if cuda else ", and there is no CUDA device")
    for name, distribution, module in (
        ("Transformer Engine", "transformer-engine", "transformer_engine"),
        ("Liger", "liger-kernel", "liger_kernel"),
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


def step_libraries(*, cuda: bool) -> list[Choice]:
    """What `training.libraries` at its defaults would choose on this machine for a run in bf16 at ZeRO-1, by what is installed:
    a run also loads each library and holds it against PyTorch."""
    return find_choices(STEP_PARTS, {}, Where("cuda" if cuda else "cpu", conv_channels=8))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
