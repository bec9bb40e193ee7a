"""The inner problem shared by the token loop and the chunk form: features, targets, gradients, rates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_megatron.ops.memory.rule import MemoryRule
from hope_megatron.ops.memory.types import Bank

EPSILON = 1e-6


def unit(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + epsilon^2) along the last dim: of unit length where |x| is well above epsilon, smooth at zero."""
    return x * torch.rsqrt(squared_norm(x) + EPSILON**2)


def squared_norm(x: Tensor) -> Tensor:
    """|x|^2 along the last dim, which stays."""
    return x.square().sum(-1, keepdim=True)


def dsilu(z: Tensor) -> Tensor:
    """Derivative of SiLU."""
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def features(bank: Bank, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Input of the output layer: silu(w_in x) and its pre-activation, or x itself for a one-layer memory.

    x: [B, H, n or 1, C, d]. Returns [B, H, n, C, h] and z of the same shape (None for one layer).
    """
    if bank.w_in is None:
        return x, None
    z = x @ bank.w_in.mT
    return F.silu(z), z


def apply_memory(bank: Bank, x: Tensor, *, skip: bool) -> Tensor:
    """M(x) of every memory in the bank: x [B, H, n or 1, C, d] -> [B, H, n, C, o]."""
    y = features(bank, x)[0] @ bank.w_out.mT
    return x + y if skip else y


def seen(bank: Bank, rule: MemoryRule) -> Bank:
    """The weights that a memory answers with, of those that its writes add up to."""
    if rule.weights == "sum":
        return bank
    return Bank(None if bank.w_in is None else row_softmax(bank.w_in, rule), row_softmax(bank.w_out, rule))


def row_softmax(w: Tensor, rule: MemoryRule) -> Tensor:
    """c softmax of every row: descent in log W with rows on a simplex of sum c, which is mirror descent under KL divergence."""
    return rule.row_sum * w.softmax(-1)


def has_skip(bank: Bank, *, scalar: bool) -> bool:
    """Vector memories of two layers are residual (eq. 89); scalar and matrix memories are not."""
    return bank.w_in is not None and not scalar


def output_error(bank: Bank, k: Tensor, v: Tensor, phi: Tensor, rule: MemoryRule, *, scalar: bool) -> Tensor:
    """e = d loss / d (output of the layers) at the chunk-start state `bank`.

    k, v: [B, H, 1, C, d]; phi = features of k, [B, H, n, C, h]. Returns [B, H, n, C, o].
    The target is a constant of the inner problem but not of the outer one: nothing is detached.
    """
    skip = has_skip(bank, scalar=scalar)
    if rule.own_targets or scalar:
        target = apply_memory(bank, v, skip=skip)
        if rule.normalize_targets:
            target = torch.tanh(target) if scalar else unit(target)
    else:
        target = v
    if rule.predicts:
        prediction = phi @ bank.w_out.mT
        return loss_gradient((k + prediction if skip else prediction) - target, rule)
    residual = skip and rule.dot_target == "residual"
    error = k - target if residual else -target
    return error.expand(*phi.shape[:-1], error.size(-1))


def loss_gradient(r: Tensor, rule: MemoryRule) -> Tensor:
    """d loss / d prediction, of residuals r = prediction - target, [..., o].

    l2: r. huber: r, and beyond |r| = delta a vector of that length. lp: r_i |r_i|^(p - 2), with |r_i| smooth at zero.
    """
    if rule.objective == "huber":
        return r * (rule.huber_delta * torch.rsqrt(squared_norm(r) + EPSILON**2)).clamp(max=1.0)
    if rule.objective == "lp":
        return r * (r.square() + EPSILON**2).pow(rule.lp_power / 2 - 1)
    return r


def output_key(phi: Tensor, bank: Bank, rule: MemoryRule) -> Tensor:
    """Key under which the output layer is written: its features, normalised where the DGD term applies."""
    return unit(phi) if bank.w_in is not None and rule.dgd_layers == "all" else phi


def step_scale(phi: Tensor, key: Tensor, delta: Tensor | None, error_squared: Tensor) -> Tensor:
    """1 / max(1, c), c being the curvature that a token's step meets: how fast its own error shrinks per unit of rate.

    Writing -eta e key^T and -eta delta k^T (|k| = 1) changes <e, M(k)> by -eta |e|^2 (<phi, key> + |delta|^2 / |e|^2), to first
    order. Both factors grow with the outer loop's weights, without bound; Polyak's step, 1 / c, takes the error to zero.
    **choice**: the papers do without. phi, key, delta [..., h] (delta None: k is not written), error_squared [..., 1]; returns
    [..., 1].
    """
    slope = (phi * key).sum(-1, keepdim=True)
    if delta is not None:
        slope = slope + squared_norm(delta) / (error_squared + EPSILON**2)
    return slope.clamp(min=1.0).reciprocal()
