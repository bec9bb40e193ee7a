"""Memora: weights that are a softmax of what adds up. Its update by autograd, loop and chunk form, the bound of its step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hope_megatron.ops.memory import Bank, MemoryCompute, MemoryParams, MemoryRule, RateLogits, memory_chunked
from hope_megatron.ops.memory.backends.registry import KernelError
from hope_megatron.ops.memory.rule import MemoryRuleError
from tests.unit.ops.memories import STATIC, B, H, assert_same, d, h, make_inputs, make_params

RULE = MemoryRule(
    4,
    objective="l2",
    dgd_layers="none",
    weights="softmax",
    row_sum=3.0,
    eta_max=0.3,
    decay_to="zero",
    read_skip=True,
    **STATIC,
)


def test_memora_is_its_published_update():
    """W_t = c softmax(alpha_t log W_{t-1} - eta_t grad l2(W; k_t, v_t)), rows on a simplex (arXiv 2504.13173),
    gradients by autograd at the chunk's first weights, no step beyond Polyak's."""
    torch.manual_seed(0)
    q, k, v, logits = make_inputs(10)
    params = make_params(RULE)
    y, _ = memory_chunked(q, k, v, logits, params, RULE)
    q, k, v = (F.normalize(x, dim=-1) for x in (q, k, v))
    for b in range(B):
        for head in range(H):
            weights = [3.0 * w[head, 0].softmax(-1) for w in params.mem]
            for t in range(10):
                if t % 4 == 0:
                    first = [w.clone().requires_grad_() for w in weights]
                at = b, t, head
                eta, alpha = 0.3 * torch.sigmoid(logits.eta[at]), torch.sigmoid(logits.alpha[at])
                error = k[at] + first[1] @ F.silu(first[0] @ k[at]) - v[at]
                gradient = torch.autograd.grad(0.5 * error.square().sum(), first)
                curvature = sum(g.square().sum() for g in gradient) / error.square().sum()  # |grad l|^2 / 2 l
                eta = eta / max(1.0, curvature.item())
                weights = [3.0 * (alpha * w.log() - eta * g).softmax(-1) for w, g in zip(weights, gradient)]
                expected = q[at] + weights[1] @ F.silu(weights[0] @ q[at])
                torch.testing.assert_close(y[at], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"decay_to": "initial", "objective": "huber", "huber_delta": 0.3},
        {"read": "chunk_start", "read_skip": False},
        {"num_layers": 1, "objective": "lp"},
    ],
    ids=str,
)
@pytest.mark.parametrize("momentum", [False, True])
def test_chunk_form_is_the_loop(changes, momentum):
    torch.manual_seed(1)
    rule = replace(RULE, **changes)
    assert_same(rule, 13, layers=rule.num_layers, momentum=momentum, warm=True)


def test_rows_keep_their_sum_and_a_shift_of_logarithms_changes_nothing():
    torch.manual_seed(2)
    q, k, v, logits = make_inputs(9)
    params = make_params(RULE)
    y, state = memory_chunked(q, k, v, logits, params, replace(RULE, decay_to="initial"))
    shifted = MemoryParams(Bank(params.mem.w_in + 5.0, params.mem.w_out - 2.0))
    again, _ = memory_chunked(q, k, v, logits, shifted, replace(RULE, decay_to="initial"))
    torch.testing.assert_close(again, y, rtol=1e-10, atol=1e-10)
    assert state.now.mem.w_in.shape == (B, H, 1, h, d)


def test_the_longest_step_forgets_where_it_began():
    """One key at the largest rate, all at once: the error of a matrix memory of two rows and inputs never grows."""
    from hope_megatron.config.model import MemoryConfig

    settings = dict(
        STATIC, num_layers=1, objective="l2", weights="softmax", row_sum=6.0, dgd_layers="none", decay="none"
    )
    limit = MemoryConfig(chunk_tokens=8, **settings).largest_stable_eta
    assert limit == pytest.approx(2 / 8 / 3)
    logarithms, key, target = (
        torch.zeros(2, 2, dtype=torch.float64),
        torch.tensor([1.0, 0.0]).double(),
        torch.tensor([3.5, 2.0]),
    )
    errors = []
    for _ in range(200):
        error = 6.0 * logarithms.softmax(-1) @ key - target
        errors.append(error.norm().item())
        logarithms = logarithms - 8 * limit * 0.9 * torch.outer(error, key)
    assert max(errors) == errors[0] and errors[-1] < 1e-6


def test_what_it_is_not():
    for changes in ({"dgd_layers": "all"}, {"objective": "dot"}, {"own_targets": True}, {"adaptive_key": True}):
        with pytest.raises(MemoryRuleError, match="weights=softmax"):
            replace(RULE, **changes)
    params, inputs = make_params(RULE), make_inputs(4)
    for kernel in ("phases", "triton", "cpu"):
        with pytest.raises(KernelError):
            memory_chunked(*inputs, params, RULE, compute=MemoryCompute(kernel=kernel))
    assert isinstance(inputs[3], RateLogits)
