"""What a GPU is assumed to reach of its data sheet: the one place for numbers that are neither counted nor on a data sheet.

Every assumption has a range and says what it rests on: `published`, figures of others that its source names; `derived`, from such
figures or from records here; `assumed`, nothing that was found. Times made of them are estimates. No GPU has run this project yet.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

Basis = Literal["published", "derived", "assumed"]
"""What a value rests on."""
End = Literal["expected", "best", "worst"]
"""Which end of every range: the expected value, the fastest or the slowest."""


@dataclass(frozen=True)
class Assumption:
    """A number that was assumed, with the range it may lie in."""

    expected: float
    best: float
    worst: float
    basis: Basis
    source: str

    def at(self, end: End) -> float:
        """The value at an end of the range."""
        return float(getattr(self, end))


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """All assumptions about a GPU that runs a training step in PyTorch."""

    launch_s: Assumption = Assumption(
        5e-6,
        3e-6,
        8e-6,
        "derived",
        "github.com/pytorch/pytorch/issues/41383: 2 us for x * x without gradients, 5 us for 2 * x, 7 us with gradients, on a host "
        "of 2020, half of it Python; cudaLaunchKernel comes on top, backward has no Python",
    )
    """Seconds the host takes to issue one kernel."""
    kernel_s: Assumption = Assumption(
        2e-6,
        1.1e-6,
        3e-6,
        "derived",
        "github.com/pytorch/pytorch/issues/161104: adding two vectors of 1,024 numbers takes 1.1 to 1.3 us by CUDA events, GPU not "
        "named; a kernel that fills an H100 needs a wave more",
    )
    """Seconds that any kernel takes on the device, however little it does."""
    chunk_s: Assumption = Assumption(
        20e-6,
        6e-6,
        60e-6,
        "derived",
        "docs/records/2026-11-28-memory-programs.md: instructions and guessed stalls of the compiled loops, walked for one warp at "
        "1.755 GHz, and 1 us for the self-memories of a stream to meet, give 11 and 2 us a chunk forward with hope_w1, 30 and 17 "
        "with hope, and 14 and 2 backward with hope_w1. Each may be off by a factor of two; no GPU has run them",
    )
    """Seconds that a loop over chunks takes per chunk of 64 tokens."""
    memory: Assumption = Assumption(
        0.75,
        0.87,
        0.57,
        "published",
        "github.com/aigatech/vpbenchmarking: copies on H100 SXM reach 2,903 GB/s, 87 %. mikamirai.com/blog/gpu-memory-bandwidth: "
        "kernels of a model on H100 SXM, by Nsight Compute, 84 % with coalesced reads, 78 % for weights, 57 % in attention",
    )
    """Share of the memory bandwidth that pointwise and reduction kernels reach."""
    matmul_bf16: Assumption = Assumption(
        0.60,
        0.80,
        0.45,
        "published",
        "github.com/stas00/ml-engineering, compute/accelerator: 794.5 TFLOP/s on an H100 SXM, 80 %, at the best of many shapes. "
        "github.com/mosaicml/llm-foundry, scripts/train/benchmarking: whole steps of dense 1B to 30B models reach 40 to 59 % "
        "HFU, so that their products reach more",
    )
    """Share of the bf16 peak that matrix products reach."""
    matmul_fp32: Assumption = Assumption(
        0.70,
        0.85,
        0.45,
        "assumed",
        "taken to be as good as bf16; no figure for TF32 or float32 on an H100 was found, nor for batches of 64 x 64 matrices",
    )
    """Share of the fp32 (or TF32) peak that matrix products reach."""
    solve: Assumption = Assumption(
        0.10, 0.30, 0.03, "assumed", "batched triangular solves are chains of small products; no figure was found"
    )
    """Share of the fp32 peak that triangular solves reach."""
    attention: Assumption = Assumption(
        0.30,
        0.37,
        0.20,
        "published",
        "arXiv 2407.08608: FlashAttention-2, which PyTorch has, reaches 35 % of an H100's peak; forward with heads of 128, "
        "370 TFLOP/s without and 335 with a causal mask. Heads of 64, and backward, less",
    )
    """Share of the bf16 peak that fused attention reaches."""
    link: Assumption = Assumption(
        0.80,
        1.07,
        0.55,
        "published",
        "github.com/NVIDIA/nccl-tests/issues/212, by a maintainer of NCCL: 370 of 450 GB/s on H100, about 480 for all-reduces with "
        "NVLink SHARP. github.com/stas00/ml-engineering, network: 16 GB on 8 x H200, 361 to 367, and 480; 64 MB on 8 x B200, 45 %",
    )
    """Share of the bandwidth inside a node that collectives reach, as bus bandwidth."""
    network: Assumption = Assumption(
        0.85,
        0.95,
        0.50,
        "published",
        "github.com/stas00/ml-engineering, network: all-reduces of 4 GB over 4 nodes reach 365 (8 x H200) and 377 GB/s (8 x B200) "
        "of the 8 x 50 GB/s of a node's ports; 1 GB 362, 256 MB 229",
    )
    """Share of the bandwidth of a node's ports that collectives between nodes reach, as bus bandwidth."""
    collective_s: Assumption = Assumption(
        30e-6,
        15e-6,
        60e-6,
        "derived",
        "github.com/stas00/ml-engineering, network: all-reduces of 32 KB to 1 MB take about 50 us on 8 x B200, called from PyTorch",
    )
    """Seconds that a collective inside a node takes beside its transfer."""
    collective_between_s: Assumption = Assumption(
        120e-6,
        40e-6,
        400e-6,
        "derived",
        "github.com/stas00/ml-engineering, network: all-reduces of 256 KB to 2 MB take about 380 us over 4 nodes of 8 x B200 on "
        "EFA; InfiniBand is taken to be faster",
    )
    """The same over several nodes."""
    host_link: Assumption = Assumption(
        0.80,
        0.87,
        0.50,
        "published",
        "github.com/aigatech/vpbenchmarking: 54.8 GB/s to an H100 and 46.8 GB/s from it, of PCIe 5.0's 63, from pinned memory",
    )
    """Share of the bandwidth between host and device that copies reach."""


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
        changes[name] = Assumption(value, better, worse, "derived", source)
    return replace(DEFAULT, **changes)
