"""What a GPU is assumed to reach of its data sheet: the one place for numbers that are neither counted nor on a data sheet.

Every assumption has a range and says where it comes from. **The sources have not been checked against their pages, and some
values are guesses**: times that `hope rehearse` derives from them are estimates. No GPU has run this project yet.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

End = Literal["expected", "best", "worst"]
"""Which end of every range: the expected value, the fastest or the slowest."""


@dataclass(frozen=True)
class Assumption:
    """A number that was assumed, with the range it may lie in."""

    expected: float
    best: float
    worst: float
    source: str

    def at(self, end: End) -> float:
        """The value at an end of the range."""
        return float(getattr(self, end))


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """All assumptions about a GPU that runs a training step in PyTorch."""

    launch_s: Assumption = Assumption(
        5e-6,
        4e-6,
        8e-6,
        "PyTorch issues a kernel in 4 to 8 us from Python: PyTorch's CUDA-graphs article (2021) shows gaps of this size; "
        "autograd's backward is at the lower end",
    )
    """Seconds the host takes to issue one kernel."""
    kernel_s: Assumption = Assumption(
        2e-6,
        1.5e-6,
        3e-6,
        "an empty kernel occupies an A100 or H100 for 1.5 to 3 us between its neighbours in a CUDA graph",
    )
    """Seconds that any kernel takes on the device, however little it does."""
    chunk_s: Assumption = Assumption(
        50e-6,
        15e-6,
        130e-6,
        "docs/records/2026-11-27-memory-kernels.md: instructions and guessed stalls of the compiled loops, walked for one warp at "
        "1.755 GHz, give 30 and 2 us a chunk forward with hope_w1, 78 and 17 with hope (mean 48), and 41 and 2 backward with "
        "hope_w1; hope's backward is not compiled. Each may be off by a factor of two; no GPU has run them",
    )
    """Seconds that a loop over chunks takes per chunk of 64 tokens."""
    memory: Assumption = Assumption(
        0.75,
        0.90,
        0.60,
        "STREAM-like copies reach 90 to 92 % of an H100's HBM bandwidth; small tensors and strided access less",
    )
    """Share of the memory bandwidth that pointwise and reduction kernels reach."""
    matmul_bf16: Assumption = Assumption(
        0.60,
        0.75,
        0.45,
        "cuBLAS bf16 products of 4K to 8K matrices reach 60 to 75 % of an H100's 989 TFLOP/s under its power limit; "
        "llm-foundry trains dense 1.3B models at 42 % MFU in total",
    )
    """Share of the bf16 peak that matrix products reach."""
    matmul_fp32: Assumption = Assumption(
        0.70, 0.85, 0.50, "cuBLAS SGEMM; batched products of 64 x 64 matrices are at the lower end"
    )
    """Share of the fp32 (or TF32) peak that matrix products reach."""
    solve: Assumption = Assumption(
        0.10, 0.30, 0.03, "batched triangular solves are chains of small products; no published figure, a guess"
    )
    """Share of the fp32 peak that triangular solves reach."""
    attention: Assumption = Assumption(
        0.45,
        0.60,
        0.30,
        "FlashAttention-2 reaches 350 to 400 TFLOP/s forward and less backward on an H100 (arXiv 2407.08608)",
    )
    """Share of the bf16 peak that fused attention reaches."""
    link: Assumption = Assumption(
        0.75, 0.85, 0.55, "nccl-tests' bus bandwidth on a DGX H100: 350 to 390 GB/s of 450 for large messages"
    )
    """Share of the bandwidth inside a node that collectives reach."""
    network: Assumption = Assumption(
        0.80,
        0.92,
        0.50,
        "nccl-tests' bus bandwidth between DGX nodes: 42 to 46 GB/s of 50 per GPU; shared fabrics less",
    )
    """Share of the bandwidth between nodes that collectives reach."""
    collective_s: Assumption = Assumption(
        30e-6, 15e-6, 60e-6, "nccl-tests' latency of small messages: 15 us in a node, 30 to 60 us over several"
    )
    """Seconds that a collective takes beside its transfer."""


DEFAULT = Efficiency()


def calibrated(values: dict[str, float], source: str) -> Efficiency:
    """The default assumptions with some replaced by measured values, whose range is 10 % to either side.

    Raises:
        KeyError: for a name that is no assumption.
    """
    known = {field.name for field in fields(Efficiency)}
    changes = {}
    for name, value in values.items():
        if name not in known:
            raise KeyError(name)
        better, worse = (value / 1.1, value * 1.1) if name.endswith("_s") else (min(1.0, value * 1.1), value / 1.1)
        changes[name] = Assumption(value, better, worse, source)
    return replace(DEFAULT, **changes)
