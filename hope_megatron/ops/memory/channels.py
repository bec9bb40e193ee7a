"""Rates of channels: a matrix memory whose retention and learning rate are vectors over the key's channels (RWKV-7).

    W_t = W_{t-1} (diag(alpha_t) - k_t (eta_t . k_t)^T) + v_t (eta_t . k_t)^T                   arXiv 2503.14456, eq. 19

with unit keys k_t; the write's key is k_t . lerp(1, eta_t, 1). Retention is alpha = exp(-e^(-1/2) sigmoid(x)), ibid., at least
0.545: no product of a chunk's retentions vanishes in float32, nor does its inverse overflow. README.md derives the chunk form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hope_megatron.ops.memory.inner import unit
from hope_megatron.ops.memory.layout import Group
from hope_megatron.ops.memory.rule import MemoryRule
from hope_megatron.ops.memory.tables import lower_inverse
from hope_megatron.ops.memory.types import RateLogits


def channel_rates(logits: RateLogits, rule: MemoryRule) -> tuple[Tensor, Tensor]:
    """eta and log alpha of every key channel, of the shape of their logits [..., d]."""
    assert logits.eta is not None and logits.alpha is not None  # check_arguments
    return rule.eta_max * torch.sigmoid(logits.eta), -math.exp(-0.5) * torch.sigmoid(logits.alpha)


def channel_token(w: Tensor, k: Tensor, v: Tensor, eta: Tensor, log_alpha: Tensor) -> Tensor:
    """The memory after one token: w [B, H, d, d]; unit k, v, eta, log alpha [B, H, d]."""
    kept, row = w * log_alpha.exp().unsqueeze(-2), (v - (w @ k.unsqueeze(-1)).squeeze(-1)).unsqueeze(-1)
    return kept + row * (eta * k).unsqueeze(-2)


def channel_chunk(
    q: Tensor, k: Tensor, v: Tensor, logits: RateLogits, rule: MemoryRule, group: Group
) -> tuple[Tensor, Group]:
    """Write and read along one chunk, or a part of one: nothing that is written depends on where it begins.

    Args:
        q, k, v: x^q, x^k, x^v, [N, C, d], C at most `LONGEST_CHANNEL_CHUNK`.
        logits: of eta and alpha, [N, C, d].

    Returns:
        y [N, C, d], and the group after the last token.
    """
    (eta, log_alpha), w = channel_rates(logits, rule), group.now.w_vector
    assert w is not None
    q, k, v = unit(q), unit(k), unit(v) if rule.normalize_values else v
    total = log_alpha.cumsum(1)  # L_t: what is left of a channel is exp(L_t)
    asked, read = k * (total - log_alpha).exp(), q * total.exp()  # k_t as W_0 hears it through W_{t-1}; q_t through W_t
    written = eta * k * (-total).exp()
    inverse = lower_inverse(torch.bmm(asked, written.mT).tril(-1))
    rows = torch.bmm(inverse, v - torch.bmm(asked, w.mT))  # v_t - W_{t-1} k_t
    y = torch.bmm(read, w.mT) + torch.bmm(torch.bmm(read, written.mT).tril(), rows)
    end = total[:, -1:]
    now = w * end.exp() + torch.bmm(rows.mT, eta * k * (end - total).exp())
    return y, group._replace(now=group.now._replace(w_vector=now))
