"""Documents inside one stream: outputs and gradients of each are those of the document read alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hope_megatron.ops.memory import Bank, MemoryParams, MemoryRule, RateLogits, memory_chunked, memory_packed
from hope_megatron.ops.short_conv import short_conv

B, H, T, d, h = 2, 2, 41, 6, 5
cuts = st.lists(st.integers(1, T - 1), max_size=6, unique=True).map(sorted)
rules = st.sampled_from(
    [
        MemoryRule(8, 8, decay_to="zero"),
        MemoryRule(8, 8),
        MemoryRule(4, 8),
        MemoryRule(8, 8, objective="l2", dgd_layers="input", eta_max=0.02),
    ]
)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def numbers(rows: list[list[int]]) -> torch.Tensor:
    lengths = [torch.tensor([0, *row, T]).diff() for row in rows]
    return torch.stack([torch.repeat_interleave(torch.arange(len(x)), x) for x in lengths])


def apart(q, k, v, logits, params, rule, rows):
    outputs = []
    for b, row in enumerate(rows):
        parts = []
        for start, stop in itertools.pairwise([0, *row, T]):
            cut = lambda x, i=b, s=slice(start, stop): None if x is None else x[i : i + 1, s]  # noqa: E731
            parts.append(memory_chunked(cut(q), cut(k), cut(v), RateLogits(*map(cut, logits)), params, rule)[0])
        outputs.append(torch.cat(parts, 1))
    return torch.cat(outputs)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(cuts, min_size=B, max_size=B), rule=rules, momentum=st.booleans(), seed=st.integers(0, 2**16))
def test_documents_equal_the_documents_apart(rows, rule, momentum, seed):
    torch.manual_seed(seed)
    banks = [Bank(normal(H, n, h, d), normal(H, n, outputs, h)) for n, outputs in ((1, d), (2, d), (2, 1))]
    rates = [normal(B, T, H) for _ in range(2 + momentum)]
    qkv, params = [normal(B, T, H, d) for _ in range(3)], MemoryParams(*banks)
    inputs, tensors = (*qkv, RateLogits(*rates)), [*qkv, *rates, *(w for bank in banks for w in bank)]
    target = torch.randn_like(qkv[0])
    together = memory_packed(*inputs, params, rule, numbers(rows))
    alone = apart(*inputs, params, rule, rows)
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad((together * target).sum(), tensors)
    expected = torch.autograd.grad((alone * target).sum(), tensors)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("width", [1, 4])
def test_convolution_does_not_reach_into_another_document(width):
    x, weight = torch.randn(1, T, 3, dtype=torch.float64), torch.randn(3, width, dtype=torch.float64)
    together, _ = short_conv(x, weight, None, numbers([[2, 3, 20]]))
    alone = torch.cat([short_conv(x[:, a:b], weight)[0] for a, b in itertools.pairwise([0, 2, 3, 20, T])], 1)
    torch.testing.assert_close(together, alone)
