"""The kernels against PyTorch on the device at hand: y, final weights and every gradient of short streams, easy and hard ones.

What is exact comes from PyTorch in float64, and how far rounding may lead from PyTorch in the kernels' own precision.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hope_megatron.ops.memory.backends.autograd import AUTOGRAD
from hope_megatron.ops.memory.backends.phases.scan import PHASES
from hope_megatron.ops.memory.backends.registry import Backend, Case
from hope_megatron.ops.memory.backends.triton.unchecked import UNCHECKED
from hope_megatron.ops.memory.rule import AUTO, MemoryCompute
from hope_megatron.ops.memory.types import Bank, MemoryParams, RateLogits

log = logging.getLogger(__name__)

KINDS = ("random keys", "one key", "eight keys, retention of 1e-4 and 1 - 1e-7")

FLOORS = {"fp32": 1e-4, "bf16": 1e-1}
"""Relative errors that are always allowed. Rounding is below; a miscompiled product is far above."""

ROUNDING_FACTOR = 10.0
"""Errors may be this many times those of PyTorch in the same precision,"""

MOST = 0.25
"""but no larger."""


class Size(NamedTuple):
    """How much is computed."""

    heads: int = 2
    pieces: tuple[int, ...] = (2, 1)
    """Periods of the pieces that the streams are read in: each begins with the state of the one before."""
    kinds: tuple[str, ...] = KINDS


SMALL = Size(1, (1, 1), ("one key",))
"""For the interpreter, which takes seconds for what a GPU does in microseconds."""


LARGE = Size()


def check(case: Case, size: Size = LARGE) -> dict[str, Any]:
    """{"trusted", "reason", "errors": {kind: {result: [error, limit]}}}: forward and backward, twice, on small inputs.

    The kernels that run, and how, depend on the case but for its streams. Nothing is raised: what goes wrong is the reason.
    """
    found: dict[str, Any] = {"trusted": False, "errors": {}}
    try:
        for number, kind in enumerate(size.kinds, 1):
            errors = _errors(case, kind, size)
            found["errors"][kind] = errors
            name, (error, limit) = max(errors.items(), key=lambda x: _share(*x[1]))
            log.info(
                "memory kernels, check %d of %d (%s): worst is %s, %.1e", number, len(size.kinds), kind, name, error
            )
            if not _share(error, limit) <= 1.0:  # a NaN ends here
                return found | {"reason": f"{kind}: {name} is {error:.1e} off, at most {limit:.1e} is rounding"}
    except Exception as error:
        first, *_ = str(error).strip().splitlines() or [""]
        return found | {"reason": f"{type(error).__name__}: {first[:500]}", "message": str(error)[:20_000]}
    return found | {"trusted": True, "reason": ""}


def _share(error: float, limit: float) -> float:
    """How much of its limit an error takes; NaN counts as too much."""
    return error / limit if error == error else float("inf")


def _errors(case: Case, kind: str, size: Size) -> dict[str, tuple[float, float]]:
    """Of every result: its error relative to its norm, and the limit."""
    asked, reference = MemoryCompute(kernel="triton", precision=case.precision), _reference(case)
    inputs = list(_inputs(case, kind, size))
    run = functools.partial(_results, case, inputs, size)
    exact = run(torch.float64, reference, AUTO)
    found, again = run(torch.float32, UNCHECKED, asked), run(torch.float32, UNCHECKED, asked)
    errors = {name: _distance(found[name], x) for name, x in exact.items()}
    limits = dict.fromkeys(exact, FLOORS[case.precision])
    rounds = MemoryCompute(kernel=reference.kernel, precision=case.precision)
    if case.precision == "fp32" or reference is PHASES:
        rounded = run(torch.float32, reference, rounds)
        limits = {
            name: min(MOST, max(floor, ROUNDING_FACTOR * _distance(rounded[name], exact[name])))
            for name, floor in limits.items()
        }
    found_twice = {name: (errors[name], limits[name]) for name in errors}
    changed = sum(not torch.equal(found[name], again[name]) for name in found)
    return found_twice | {"results that changed when run again": (float(changed), 0.5)}


def _reference(case: Case) -> Backend:
    return PHASES if PHASES.why_not(case._replace(precision="fp32")) is None else AUTOGRAD


def _distance(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def _inputs(case: Case, kind: str, size: Size) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of all that results are differentiated by, on the CPU in float64."""
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    rule, d, h, H = case.rule, case.d, case.h, size.heads
    T = sum(size.pieces) * rule.period
    shape = (1, T, H)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    few = {"random keys": T, "one key": 1}.get(kind, 8)
    k = normal(1, few, H, d)[:, torch.arange(T) % few]
    yield from {"q": k if few < T else normal(*shape, d), "k": k, "v": normal(*shape, d)}.items()
    fast = 0.0 if few == T else 4.0
    retention = normal(*shape) + 2.0 + fast
    if few == 8:
        retention = torch.where(torch.arange(T).view(1, T, 1) % 7 == 3, -9.2, 16.1) + 0.0 * retention
    for name, there, x in zip(
        ("eta", "alpha", "theta"), case.rates, (normal(*shape) + fast, retention, normal(*shape))
    ):
        if there:
            yield name, x
    for name, n, outputs in (("mem", 1, d), ("vector", rule.num_vector, d), ("scalar", rule.num_scalar, 1)):
        if n and rule.num_layers == 2:
            yield f"{name} w_in", 1.5 * normal(H, n, h, d) / d**0.5
        if n:
            yield f"{name} w_out", 0.5 * normal(H, n, outputs, h) / h**0.5


def _results(
    case: Case,
    inputs: list[tuple[str, Tensor]],
    size: Size,
    dtype: torch.dtype,
    backend: Backend,
    compute: MemoryCompute,
) -> dict[str, Tensor]:
    """y, the weights at the end and the gradients of all inputs."""
    from hope_megatron.ops.memory.operator import memory_chunked

    device = torch.device("cpu") if case.device == "cpu" else torch.device(case.device, torch.cuda.current_device())
    leaves = {name: x.to(device, dtype, copy=True).requires_grad_() for name, x in inputs}
    banks = {
        name: Bank(leaves.get(f"{name} w_in"), leaves[f"{name} w_out"]) if f"{name} w_out" in leaves else None
        for name in ("mem", "vector", "scalar")
    }
    rates = [leaves.get(name) for name in ("eta", "alpha", "theta")]
    lengths, whole = [n * case.rule.period for n in size.pieces], (leaves["q"], leaves["k"], leaves["v"], *rates)
    cut = [None if x is None else x.split(lengths, 1) for x in whole]
    state, outputs = None, []
    for i in range(len(lengths)):
        q, k, v, *logits = (None if x is None else x[i] for x in cut)
        y, state = memory_chunked(
            q, k, v, RateLogits(*logits), MemoryParams(**banks), case.rule, state, compute=compute, backends=(backend,)
        )
        outputs.append(y)
    trees = [tree for tree in (state.now, state.momentum) if tree is not None]
    ends = [w for tree in trees for bank in tree if bank is not None for w in bank if w is not None]
    found = {"y": torch.cat(outputs, 1), **{f"final weights {i}": w for i, w in enumerate(ends)}}
    generator = torch.Generator().manual_seed(99)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in found.values())
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found |= {f"gradient of {name}": x for name, x in zip(leaves, gradients) if x is not None}
    return {name: x.detach() for name, x in found.items()}
