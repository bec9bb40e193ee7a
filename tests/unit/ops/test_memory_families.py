"""Every member of the family against a few lines written from its own paper's formula, without this project's maths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hope_megatron.ops.memory import Bank, MemoryParams, MemoryRule, RateLogits, memory_chunked

B, T, H, d, h = 2, 29, 3, 6, 5
STATIC = dict(adaptive_key=False, adaptive_value=False, adaptive_eta=False, adaptive_alpha=False, own_targets=False)
DESCENT = MemoryRule(
    8, 8, objective="l2", dgd_layers="none", eta_max=0.1, momentum_max=0.95, decay_to="zero", read_skip=True, **STATIC
)


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return rand(B, T, H, d), rand(B, T, H, d), rand(B, T, H, d)


def normalized(qkv):
    return [F.normalize(x, dim=-1) for x in qkv]


def matrix_memory(start=None) -> MemoryParams:
    return MemoryParams(Bank(None, torch.zeros(H, 1, d, d, dtype=torch.float64) if start is None else start))


def check(qkv, logits, params, rule, expected, atol=1e-9):
    y, _ = memory_chunked(*qkv, logits, params, rule)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=atol)


def test_linear_attention(qkv):
    """y_t = sum_{s<=t} (q_t . k_s) v_s (arXiv 2006.16236, without a feature map), as a masked product."""
    q, k, v = normalized(qkv)
    scores = torch.einsum("bthd,bshd->bhts", q, k).tril()
    expected = torch.einsum("bhts,bshd->bthd", scores, v)
    check(
        qkv,
        RateLogits(),
        matrix_memory(),
        MemoryRule(8, 8, num_layers=1, dgd_layers="none", decay_to="zero", **STATIC),
        expected,
    )


def test_retnet(qkv):
    """Retention (arXiv 2307.08621, eq. 5): scores decayed by gamma^(t - s), gamma = 1 - 2^(-5 - head)."""
    q, k, v = normalized(qkv)
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))
    distance = (torch.arange(T)[:, None] - torch.arange(T)).clamp(min=0)
    decay = gamma[:, None, None] ** distance
    expected = torch.einsum("bhts,bshd->bthd", (torch.einsum("bthd,bshd->bhts", q, k) * decay).tril(), v)
    alpha = gamma.logit().expand(B, T, H)
    check(
        qkv,
        RateLogits(alpha=alpha),
        matrix_memory(),
        MemoryRule(8, 8, num_layers=1, dgd_layers="none", decay_to="zero", **STATIC),
        expected,
    )


@pytest.mark.parametrize("gated", [False, True])
def test_deltanet(qkv, gated):
    """S = [alpha] S (I - beta k k^T) + beta v k^T: DeltaNet (arXiv 2406.06484), Gated DeltaNet (arXiv 2412.06464, eq. 10)."""
    q, k, v = normalized(qkv)
    beta, alpha = torch.rand(B, T, H, dtype=torch.float64), torch.rand(B, T, H, dtype=torch.float64)
    state, expected, eye = torch.zeros(B, H, d, d, dtype=torch.float64), [], torch.eye(d, dtype=torch.float64)
    for t in range(T):
        b = beta[:, t, :, None, None]
        transition = eye - b * k[:, t, :, :, None] * k[:, t, :, None, :]
        state = (alpha[:, t, :, None, None] if gated else 1.0) * state @ transition + b * v[:, t, :, :, None] * k[
            :, t, :, None, :
        ]
        expected.append(torch.einsum("bhvk,bhk->bhv", state, q[:, t]))
    logits = RateLogits(beta.logit(), alpha.logit() if gated else None)
    rule = MemoryRule(8, 8, num_layers=1, dgd_layers="input", decay_erased=True, decay_to="zero", **STATIC)
    check(qkv, logits, matrix_memory(), rule, torch.stack(expected, 1))


@pytest.mark.parametrize(("layers", "normalize"), [(1, False), (2, False), (2, True)])
def test_ttt(qkv, layers, normalize):
    """Mini-batch gradient descent on 0.5 |f(k) - v|^2, gradients by autograd at the mini-batch's first weights
    (arXiv 2407.04620, eq. 7; f linear, or a residual MLP; without that paper's layer norm)."""
    q, k, v = normalized(qkv)
    eta = 0.1 * torch.rand(B, T, H, dtype=torch.float64)
    weights = [0.3 * rand(H, d, d)] if layers == 1 else [rand(H, h, d), 0.3 * rand(H, d, h)]
    keep = torch.ones_like(eta)
    expected = _gradient_descent(weights, layers, q, k, v, eta, keep, 0 * keep, chunk=8, normalize=normalize)
    bank = Bank(None, weights[0][:, None]) if layers == 1 else Bank(weights[0][:, None], weights[1][:, None])
    rule = replace(DESCENT, num_layers=layers, normalize_steps=normalize)
    check(qkv, RateLogits((10 * eta).logit()), MemoryParams(bank), rule, expected)


@pytest.mark.parametrize("normalize", [False, True])
def test_titans(qkv, normalize):
    """M_t = (1 - a) M_{t-1} + S_t, S_t = theta S_{t-1} - eta grad l(M; k_t, v_t) (arXiv 2501.00663, eqs. 13-14), gradients
    by autograd at the chunk's first weights (its section 3.2)."""
    q, k, v = normalized(qkv)
    eta, alpha, theta = (torch.rand(B, T, H, dtype=torch.float64) * s for s in (0.1, 1.0, 0.95))
    weights = [rand(H, h, d), 0.3 * rand(H, d, h)]
    expected = _gradient_descent(weights, 2, q, k, v, eta, alpha, theta, chunk=8, normalize=normalize)
    bank = Bank(weights[0][:, None], weights[1][:, None])
    rule = replace(DESCENT, normalize_steps=normalize)
    check(
        qkv, RateLogits((10 * eta).logit(), alpha.logit(), (theta / 0.95).logit()), MemoryParams(bank), rule, expected
    )


def test_dla(qkv):
    """M_t = M_{t-1} + eta grad <M(k_t), v_t> (arXiv 2505.23735), gradients by autograd at the chunk's first weights."""
    q, k, v = normalized(qkv)
    eta = 0.1 * torch.rand(B, T, H, dtype=torch.float64)
    weights, keep = [rand(H, h, d), 0.3 * rand(H, d, h)], torch.ones_like(eta)
    expected = _gradient_descent(weights, 2, q, k, v, eta, keep, 0 * keep, chunk=8, normalize=False, dot=True)
    rule = replace(DESCENT, objective="dot", dot_target="full")
    check(qkv, RateLogits((10 * eta).logit()), MemoryParams(Bank(*(w[:, None] for w in weights))), rule, expected)


def _gradient_descent(weights, layers, q, k, v, eta, alpha, theta, chunk, normalize, dot=False):
    """Every sequence and head on its own, one token at a time; y_t = f_t(q_t).

    normalize: no step beyond Polyak's, 2 l / |grad l|^2. dot: the loss is -<f(k), v>.
    """

    def f(ws, x):
        return ws[0] @ x if layers == 1 else x + ws[1] @ F.silu(ws[0] @ x)

    expected = torch.empty_like(q)
    for b in range(B):
        for head in range(H):
            now = [w[head].clone() for w in weights]
            speed = [torch.zeros_like(w) for w in now]
            for t in range(T):
                if t % chunk == 0:
                    first = [w.clone().requires_grad_() for w in now]
                answer, value = f(first, k[b, t, head]), v[b, t, head]
                loss = -answer @ value if dot else 0.5 * (answer - value).square().sum()
                gradients = torch.autograd.grad(loss, first)
                if normalize:
                    polyak = 2 * loss / sum(g.square().sum() for g in gradients)
                    gradients = [min(1.0, polyak.item()) * g for g in gradients]
                speed = [theta[b, t, head] * s - eta[b, t, head] * g for s, g in zip(speed, gradients)]
                now = [alpha[b, t, head] * w + s for w, s in zip(now, speed)]
                expected[b, t, head] = f(now, q[b, t, head])
    return expected
