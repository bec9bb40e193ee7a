"""Memories and streams that the operator's tests share, and the comparison of loop and chunk form."""

from __future__ import annotations

import functools

import torch

from hope_megatron.ops.memory import (
    Bank,
    MemoryParams,
    MemoryRule,
    RateLogits,
    memory_chunked,
    memory_recurrent,
)

B, H, d, h = 2, 2, 6, 5
HOPE = MemoryRule(chunk_tokens=8, self_chunk_tokens=8)
STATIC = dict(adaptive_key=False, adaptive_value=False, adaptive_eta=False, adaptive_alpha=False, own_targets=False)


def alone(backend):
    """`memory_chunked` with one backend and no other: an error where that cannot take a case."""
    return functools.partial(memory_chunked, backends=(backend,))


def make_params(rule: MemoryRule, layers: int = 2, scale: float = 0.3) -> MemoryParams:
    def bank(n: int, outputs: int) -> Bank | None:
        if n == 0:
            return None
        if layers == 1:
            return Bank(None, scale * torch.randn(H, n, outputs, d, dtype=torch.float64))
        return Bank(
            torch.randn(H, n, h, d, dtype=torch.float64), scale * torch.randn(H, n, outputs, h, dtype=torch.float64)
        )

    return MemoryParams(bank(1, d), bank(rule.num_vector, d), bank(rule.num_scalar, 1))


def make_inputs(T: int, *, decay: bool = True, momentum: bool = False):
    q, k, v = (torch.randn(B, T, H, d, dtype=torch.float64) for _ in range(3))
    rate = lambda shift: torch.randn(B, T, H, dtype=torch.float64) + shift  # noqa: E731
    return q, k, v, RateLogits(rate(0.0), rate(3.0) if decay else None, rate(0.0) if momentum else None)


def leaves(*trees) -> list[torch.Tensor]:
    found = []
    for tree in trees:
        if isinstance(tree, torch.Tensor):
            found.append(tree)
        elif isinstance(tree, tuple):
            found += leaves(*tree)
    return found


def outputs_and_gradients(fn, q, k, v, logits, params, rule, state):
    """y, final state and the gradient of every input for a fixed random functional of y and the state."""
    inputs = leaves(q, k, v, logits, params, *((state.now, state.start, state.momentum) if state else ()))
    inputs = [x.detach().requires_grad_() for x in inputs]
    rebuilt = iter(inputs)

    def rebuild(tree):
        if isinstance(tree, torch.Tensor):
            return next(rebuilt)
        if isinstance(tree, tuple):
            parts = [rebuild(x) for x in tree]
            return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
        return tree

    args = [rebuild(x) for x in (q, k, v, logits, params)]
    if state is not None:
        state = state._replace(now=rebuild(state.now), start=rebuild(state.start), momentum=rebuild(state.momentum))
    y, end = fn(*args, rule, state)
    results = leaves(y, end.now, end.momentum)
    generator = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in results)
    return results, torch.autograd.grad(loss, inputs, allow_unused=True)


def assert_same(
    rule: MemoryRule, T: int, *, layers: int = 2, decay: bool = True, momentum: bool = False, warm: bool = False
):
    params = make_params(rule, layers)
    q, k, v, logits = make_inputs(T, decay=decay, momentum=momentum)
    state = None
    if warm:  # a state in the middle of a chunk, with weights of its own
        _, state = memory_recurrent(*make_inputs(11, decay=decay, momentum=momentum), params, rule)
    slow, slow_grads = outputs_and_gradients(memory_recurrent, q, k, v, logits, params, rule, state)
    fast, fast_grads = outputs_and_gradients(memory_chunked, q, k, v, logits, params, rule, state)
    for a, b in zip(slow + list(slow_grads), fast + list(fast_grads)):
        if a is None or b is None:  # an unused input has no gradient, or an exactly zero one
            assert a is None or not a.any()
            assert b is None or not b.any()
        else:
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
