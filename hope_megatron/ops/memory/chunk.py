"""The memory operator in chunk form: what trains.

Inside a chunk all inner gradients are taken at the chunk's first state, so a chunk is a handful of matrix products and one
triangular system per key set; the loop over chunks is the only sequential part. README.md derives the form; it is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hope_megatron.ops.memory.inner import (
    apply_memory,
    dsilu,
    features,
    has_skip,
    output_error,
    output_key,
    output_uses_dgd,
    unit,
)
from hope_megatron.ops.memory.tables import ChunkTables, chunk_tables, delta_inverse
from hope_megatron.ops.memory.types import Bank, MemoryParams, MemoryRule, MemoryState, RateLogits, initial_state


def memory_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: RateLogits,
    params: MemoryParams,
    rule: MemoryRule,
    state: MemoryState | None = None,
) -> tuple[Tensor, MemoryState]:
    """Read and write the memories of every head along a piece of a stream (eqs. 83-93).

    Args:
        q, k, v: projected and convolved inputs x^q, x^k, x^v, each [B, T, H, d]; any T of at least 1.
        logits: static parts of the rates, each [B, T, H].
        params: learned initial memories, [H, n, ...]; used when `state` is None.
        rule: how the memories learn.
        state: where an earlier piece of the same streams ended; None starts new streams.

    Returns:
        y [B, T, H, d] in q's dtype, and the state after the last token. Differentiable with respect to everything,
        through all writes.

    Computes in float32 (float64 if q is float64) whatever the input dtype.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if state is None:
        state = initial_state(params, q.size(0), momentum=logits.theta is not None, dtype=dtype)
    x_q, x_k, x_v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))  # [B, H, T, d]
    logits = RateLogits(*(None if r is None else r.transpose(1, 2).to(dtype) for r in logits))

    outputs, offset = [], 0
    while offset < q.size(1):
        # The longer of the two chunk lengths is the period; `piece` is what is left of it.
        period = max(rule.chunk_tokens, rule.self_chunk_tokens)
        piece = slice(offset, min(q.size(1), offset + period - state.position % period))
        rates = RateLogits(*(None if r is None else r[:, :, piece] for r in logits))
        inputs, self_state = _self_memories(x_k[:, :, piece], x_v[:, :, piece], rates, rule, state)
        y, state = _main_memory(unit(x_q[:, :, piece]), inputs, rule, self_state)
        outputs.append(y)
        offset = piece.stop
    return torch.cat(outputs, 2).transpose(1, 2).to(q.dtype), state


class _Inputs(NamedTuple):
    """What the self-memories make of a piece of the stream: keys and values [B, H, C, d], rates [B, H, C]."""

    k: Tensor
    v: Tensor
    eta: Tensor
    log_alpha: Tensor | None
    log_theta: Tensor | None

    def cut(self, piece: slice) -> _Inputs:
        return _Inputs(*(None if x is None else x[:, :, piece] for x in self))


def _spans(position: int, length: int, chunk: int):
    """Cut `length` tokens that begin at stream position `position` at the borders of chunks."""
    offset = 0
    while offset < length:
        stop = min(length, offset + chunk - (position + offset) % chunk)
        yield slice(offset, stop), (position + offset) % chunk == 0
        offset = stop


def _self_memories(x_k: Tensor, x_v: Tensor, logits: RateLogits, rule: MemoryRule, state: MemoryState) -> tuple[_Inputs, MemoryState]:
    """Generate keys, values and rates, and write the memories that generate them."""
    pieces = []
    for span, at_border in _spans(state.position, x_k.size(2), rule.self_chunk_tokens):
        if at_border:
            state = state._replace(start=state.start._replace(vector=state.now.vector, scalar=state.now.scalar))
        rates = RateLogits(*(None if r is None else r[:, :, span] for r in logits))
        inputs = _generate(x_k[:, :, span], x_v[:, :, span], rates, rule, state.start)
        pieces.append(inputs)
        if state.now.vector is not None or state.now.scalar is not None:
            chunk = _Chunk(inputs, rule)
            state = chunk.write(state, "vector")
            state = chunk.write(state, "scalar")
    if len(pieces) == 1:
        return pieces[0], state
    return _Inputs(*(None if xs[0] is None else torch.cat(xs, 2) for xs in zip(*pieces))), state


def _generate(x_k: Tensor, x_v: Tensor, logits: RateLogits, rule: MemoryRule, start: MemoryParams) -> _Inputs:
    """Keys, values and rates of a span, by the memories at its chunk's start (eqs. 86-87)."""
    k, v, eta, alpha = x_k, x_v, logits.eta, logits.alpha
    if start.vector is not None:
        adapted = [x for x, adaptive in ((x_k, rule.adaptive_key), (x_v, rule.adaptive_value)) if adaptive]
        results = list(apply_memory(start.vector, torch.stack(adapted, 2), skip=True).unbind(2))
        k = results.pop(0) if rule.adaptive_key else k
        v = results.pop(0) if rule.adaptive_value else v
    if start.scalar is not None:
        gates = list(apply_memory(start.scalar, x_k.unsqueeze(2), skip=False).squeeze(-1).unbind(2))
        eta = eta + gates.pop(0) if rule.adaptive_eta else eta
        alpha = alpha + gates.pop(0) if rule.adaptive_alpha and alpha is not None else alpha
    return _Inputs(
        k=unit(k),
        v=unit(v) if rule.normalize_values else v,
        eta=rule.eta_max * torch.sigmoid(eta),
        log_alpha=None if alpha is None else F.logsigmoid(alpha),
        log_theta=None if logits.theta is None else F.logsigmoid(logits.theta),
    )


def _main_memory(q: Tensor, inputs: _Inputs, rule: MemoryRule, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """Write M_mem with the piece's keys and values and read it with unit queries q [B, H, C, d]."""
    outputs = []
    for span, at_border in _spans(state.position, q.size(2), rule.chunk_tokens):
        if at_border:
            state = state._replace(start=state.start._replace(mem=state.now.mem))
        chunk = _Chunk(inputs.cut(span), rule)
        outputs.append(chunk.read(q[:, :, span], state))
        state = chunk.write(state, "mem")._replace(position=state.position + span.stop - span.start)
    return torch.cat(outputs, 2), state


class _Chunk:
    """One chunk (or the part of one that a stream's cut leaves): its tables, and the writes of every bank."""

    def __init__(self, inputs: _Inputs, rule: MemoryRule):
        self.k, self.v = inputs.k.unsqueeze(2), inputs.v.unsqueeze(2)  # [B, H, 1, C, d]
        self.rule = rule
        self.tables = chunk_tables(inputs.eta, inputs.log_alpha, inputs.log_theta)
        self._key_inverse: Tensor | None = None
        self._writes: dict[str, tuple[_LayerWrites | None, _LayerWrites]] = {}

    def write(self, state: MemoryState, name: str) -> MemoryState:
        """The state with bank `name` written by the whole chunk."""
        bank = getattr(state.now, name)
        if bank is None:
            return state
        write_in, write_out = self._bank_writes(state, name)
        speed = getattr(state.momentum, name) if state.momentum is not None else Bank(None, None)
        w_out, s_out = write_out.end(bank.w_out, speed.w_out)
        w_in, s_in = (None, None) if write_in is None else write_in.end(bank.w_in, speed.w_in)
        momentum = state.momentum
        if momentum is not None:
            momentum = momentum._replace(**{name: Bank(w_in, s_out) if w_in is None else Bank(s_in, s_out)})
        return state._replace(now=state.now._replace(**{name: Bank(w_in, w_out)}), momentum=momentum)

    def read(self, q: Tensor, state: MemoryState) -> Tensor:
        """M_mem(q_t): at every token as written so far (dual form), or at the chunk's start. q [B, H, C, d]."""
        bank, q = state.now.mem, q.unsqueeze(2)
        skip = self.rule.read_skip and has_skip(bank, scalar=False)
        if self.rule.read == "chunk_start":
            return apply_memory(state.start.mem, q, skip=skip).squeeze(2)
        write_in, write_out = self._bank_writes(state, "mem")
        speed = state.momentum.mem if state.momentum is not None else Bank(None, None)
        hidden = q if write_in is None else F.silu(write_in.read(q, bank.w_in, speed.w_in))
        y = write_out.read(hidden, bank.w_out, speed.w_out)
        return (q + y if skip else y).squeeze(2)

    def _bank_writes(self, state: MemoryState, name: str) -> tuple[_LayerWrites | None, _LayerWrites]:
        if name not in self._writes:
            bank, start = getattr(state.now, name), getattr(state.start, name)
            speed = getattr(state.momentum, name) if state.momentum is not None else Bank(None, None)
            phi, z = features(start, self.k)
            error = output_error(start, self.k, self.v, phi, self.rule, scalar=name == "scalar")
            eta = self.tables.eta.unsqueeze(-1)
            key = output_key(phi, start, self.rule)
            inverse = None
            if output_uses_dgd(bank, self.rule):
                inverse = delta_inverse(key, self.tables) if bank.w_in is not None else self.key_inverse
            write_out = _LayerWrites.make(key, eta * error, bank.w_out, speed.w_out, inverse, self.tables)
            write_in = None
            if bank.w_in is not None:
                drive = eta * (error @ start.w_out) * dsilu(z)
                inverse = self.key_inverse if self.rule.dgd_layers != "none" else None
                write_in = _LayerWrites.make(self.k, drive, bank.w_in, speed.w_in, inverse, self.tables)
            self._writes[name] = write_in, write_out
        return self._writes[name]

    @property
    def key_inverse(self) -> Tensor:
        """The triangular inverse for keys k, shared by every memory of the head."""
        if self._key_inverse is None:
            self._key_inverse = delta_inverse(self.k, self.tables)
        return self._key_inverse


class _LayerWrites(NamedTuple):
    """What a chunk writes into one layer: W_t = gamma_t W_0 + m_t0 S_0 - sum_s (Gamma_ts erase_s + m_ts drive_s) keys_s^T.

    Without momentum m = Gamma, and `drive` holds erase + drive together.
    """

    keys: Tensor  # [B, H, n or 1, C, x]
    drive: Tensor  # eta g, [B, H, n, C, o]
    erase: Tensor | None  # eta W_{t-1} k_t under DGD and momentum, [B, H, n, C, o]
    tables: ChunkTables

    @classmethod
    def make(cls, keys, drive, w, s, inverse: Tensor | None, tables: ChunkTables) -> _LayerWrites:
        """Solve for the rows. w, s: weights and momentum before this piece, [B, H, n, o, x]; inverse: None without DGD."""
        if inverse is None:
            return cls(keys, drive, None, tables)
        held = (tables.eta * tables.gamma_prev).unsqueeze(-1) * (keys @ w.mT)
        if tables.momentum is None:
            return cls(keys, inverse @ (held + drive), None, tables)
        moving = tables.momentum.m0_prev.unsqueeze(-1) * (keys @ s.mT)
        moving = moving - (tables.momentum.m_prev * (keys @ keys.mT)) @ drive
        return cls(keys, drive, inverse @ (held + tables.eta.unsqueeze(-1) * moving), tables)

    def read(self, x: Tensor, w: Tensor, s: Tensor | None) -> Tensor:
        """W_t x_t for every token of the piece: x [B, H, n, C, x] -> [B, H, n, C, o]."""
        tables, scores = self.tables, x @ self.keys.mT
        y = tables.gamma.unsqueeze(-1) * (x @ w.mT)
        if tables.momentum is None:
            return y - (tables.Gamma * scores) @ self.drive
        y = y + tables.momentum.m0.unsqueeze(-1) * (x @ s.mT) - (tables.momentum.m * scores) @ self.drive
        return y if self.erase is None else y - (tables.Gamma * scores) @ self.erase

    def end(self, w: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weights and momentum after the piece's last token."""
        tables = self.tables
        decay, last = tables.gamma[..., -1, None, None], tables.Gamma[..., -1, :, None]
        if tables.momentum is None:
            return decay * w - (last * self.drive).mT @ self.keys, None
        m, m0 = tables.momentum.m[..., -1, :, None], tables.momentum.m0[..., -1, None, None]
        rows = m * self.drive if self.erase is None else m * self.drive + last * self.erase
        speed = tables.momentum.theta_all[..., None, None] * s - (tables.momentum.theta_end.unsqueeze(-1) * self.drive).mT @ self.keys
        return decay * w + m0 * s - rows.mT @ self.keys, speed
