"""What the Triton kernels take, on which devices and versions, and how they are run: before any check."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from importlib.metadata import version

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.registry import Backend, Case
from hope_megatron.ops.memory.layout import Group
from hope_megatron.ops.memory.rule import MemoryCompute, MemoryRule

log = logging.getLogger(__name__)

WIDTHS = (16, 32, 64, 128)
"""Of heads and of memories."""

LONGEST_CHUNK = 128

_PRECISIONS = {"fp32": ("fp32", "tf32x3"), "bf16": ("bf16_emulated", "bf16_ptx")}
"""Of language.py, by what is asked for: in the interpreter, and on a GPU."""

TRUSTED = {8: (3, 6), 9: (3, 6), 10: (3, 9), 12: (3, 9)}
"""First Triton version that is trusted, by the major compute capability.

9 (Hopper): 3.4 to 3.7.0 miscompile `tl.dot(tl.trans(x), ...)` with x from another product (flash-linear-attention #640); no kernel
here transposes a value. 10, 12 (Blackwell): 3.6 cannot build such kernels, and recurrences of products race before 3.8."""


def why_not_taken(case: Case) -> str | None:
    """`why_not` before any check: of rules, shapes, devices and versions."""
    return _why_not_rule(case) or _why_not_shape(case) or _why_not_here(case.device)


def _why_not_rule(case: Case) -> str | None:
    rule, (eta, alpha, theta) = case.rule, case.rates
    if (
        text := rule.differs(objective=("dot", "l2"), adaptive_query=False, rates_of="head", weights="sum")
    ) is not None:
        return text
    if rule.eta_max == 0:
        return "eta_max=0 writes nothing"
    if rule.objective == "l2" and rule.num_layers == 2:
        return _why_not_descending(case)
    if theta:
        return "momentum, which it has for objective l2 and two layers"
    if rule.objective == "l2" and rule.output_uses_dgd:
        return "with objective l2 it has no Delta Gradient Descent term"
    if rule.decay_erased and (rule.num_layers == 2 or (alpha and rule.decay_to == "initial")):
        return "it scales what is erased in matrix memories that forget towards zero alone"
    if (rule.adaptive_eta and not eta) or (rule.adaptive_alpha and not alpha):
        return "memories of rates need rates from data"
    return None


def _why_not_descending(case: Case) -> str | None:
    """Two layers on l2: those of Titans and TTT-MLP."""
    rule, (_, alpha, _) = case.rule, case.rates
    taken = dict(written_layers="all", dgd_layers="none", own_targets=False, read="causal")
    if (text := rule.differs(**taken)) is not None:
        return f"with objective l2 and two layers, {text}"
    if rule.adaptive:
        return "with objective l2 and two layers it has no self-memories"
    if alpha and rule.decay_to == "initial":
        return "with objective l2 and two layers it forgets towards zero alone"
    return None


def _why_not_shape(case: Case) -> str | None:
    if case.dtype != torch.float32 or not case.plain:
        return "it takes ordinary float32 tensors"
    if case.d not in WIDTHS or case.h not in WIDTHS:
        return f"d {case.d} and h {case.h} are not both of {', '.join(map(str, WIDTHS))}"
    longest = max(case.rule.chunk_tokens, case.rule.self_chunk)
    return f"chunks of {longest} tokens are longer than {LONGEST_CHUNK}" if longest > LONGEST_CHUNK else None


def _why_not_here(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if device == "cpu":
        return None if interpreted() else "Triton runs on a CPU in its interpreter alone (TRITON_INTERPRET=1)"
    if device != "cuda" or torch.version.hip:
        return f"no Triton version is trusted on {'AMD' if torch.version.hip else device} devices yet"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, _ = torch.cuda.get_device_capability()
    first, found = TRUSTED.get(major), tuple(map(int, version("triton").split(".")[:2]))
    if first is None:
        return f"no Triton version is trusted on compute capability {major} yet"
    return f"Triton {found[0]}.{found[1]} is older than {first[0]}.{first[1]}" if found < first else None


def unwise(case: Case) -> str | None:
    """See `Backend.unwise`."""
    return "Triton's interpreter is for tests" if case.device == "cpu" else None


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def scan(
    tensors: list[Tensor | None],
    rule: MemoryRule,
    groups: tuple[Group, ...],
    *,
    compute: MemoryCompute,
    recompute: bool,
) -> tuple[Tensor, tuple[Group, ...]]:
    """See `Backend.scan`. Weights are kept at every chunk's start: `keep_every` is for others."""
    from hope_megatron.ops.memory.backends.triton.scan import triton_scan

    if compute.keep_every is not None:
        _say_what_is_kept(compute.keep_every)
    on_gpu = tensors[0].device.type != "cpu"
    precision = _PRECISIONS[compute.precision][on_gpu]
    return triton_scan(tensors, rule, groups, precision=precision, recompute=recompute)


@functools.cache
def _say_what_is_kept(keep_every: int) -> None:
    log.warning("memory.keep_every=%d is ignored: the Triton kernels keep weights at every chunk's start", keep_every)


UNCHECKED = Backend("Triton kernels", "triton", why_not_taken, scan, unwise)
"""What the check runs, and what is counted and compiled without a GPU."""
