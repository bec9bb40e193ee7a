"""The vocabulary of the memory operator.

Shapes: B sequences, T tokens, C tokens of a chunk, H heads, d head width, h memory hidden width, n memories in a bank,
o outputs of a memory (d for vector memories, 1 for scalar ones).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hope_megatron.ops.memory.rule import MemoryRule, MemoryRuleError


class Bank(NamedTuple):
    """A stack of n memories with equal shapes.

    Two layers: M(x) = [x +] w_out silu(w_in x), eq. 89. One layer (w_in None): M(x) = w_out x.
    Parameters carry [H, n, ...]; states carry [B, H, n, ...].
    """

    w_in: Tensor | None  # [..., n, h, d]
    w_out: Tensor  # [..., n, o, h]; one layer: [..., n, o, d]


class MemoryParams(NamedTuple):
    """The memories of every head: M_mem alone, and the self-memories that exist."""

    mem: Bank  # n = 1
    vector: Bank | None = None  # M_k, M_v, M_q
    scalar: Bank | None = None  # M_eta, M_alpha; o = 1


class RateLogits(NamedTuple):
    """Static parts of the rates before their sigmoids, each [B, T, H]; with rates of channels eta and alpha are [B, T, H, d]."""

    eta: Tensor | None = None  # None: eta = eta_max
    alpha: Tensor | None = None  # None: alpha = 1, no decay
    theta: Tensor | None = None  # None: no momentum


class MemoryState(NamedTuple):
    """Everything a stream needs to go on after any token; float32 (float64 for float64 inputs)."""

    now: MemoryParams  # the weights after the last token
    start: MemoryParams  # the weights at the start of the chunk the next token belongs to
    momentum: MemoryParams | None  # S, where momentum is used
    position: int  # tokens since the stream began


def map_params(fn, *trees: MemoryParams) -> MemoryParams:
    """Apply `fn` to corresponding tensors of parameter trees of equal structure."""

    def bank(*banks: Bank | None) -> Bank | None:
        if banks[0] is None:
            return None
        w_in = None if banks[0].w_in is None else fn(*(b.w_in for b in banks))
        return Bank(w_in, fn(*(b.w_out for b in banks)))

    return MemoryParams(*(bank(*banks) for banks in zip(*trees)))


def initial_state(params: MemoryParams, batch_size: int, *, momentum: bool, dtype) -> MemoryState:
    """The learned initial state for `batch_size` new streams. Differentiable with respect to `params`."""
    weights = map_params(lambda w: w.to(dtype).expand(batch_size, *w.shape), params)
    zeros = map_params(lambda w: w.new_zeros(()).expand(w.shape), weights) if momentum else None
    return MemoryState(weights, weights, zeros, 0)


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, logits: RateLogits,
    params: MemoryParams, rule: MemoryRule, state: MemoryState | None,
) -> None:  # fmt: skip
    """Hold every shape and device against the rule, before anything is computed.

    Raises:
        MemoryRuleError: naming the tensor, its shape and the one expected.
    """
    if q.dim() != 4 or 0 in q.shape:
        raise MemoryRuleError(f"q has shape {list(q.shape)}; expected [B, T, H, d], with at least one of each")
    B, T, H, _ = q.shape
    for name, x in (("k", k), ("v", v)):
        _expect(name, x, q.shape, q)
    channels = rule.rates_of == "channel"
    if channels and (logits.eta is None or logits.alpha is None or logits.theta is not None):
        raise MemoryRuleError("rates_of=channel takes logits of eta and of alpha, and no momentum")
    for name, x in logits._asdict().items():
        if x is not None:
            _expect(f"logits.{name}", x, q.shape if channels else (B, T, H), q)
    _check_banks("params", params, (H,), q, rule)
    if state is not None:
        _check_banks("state.now", state.now, (B, H), q, rule)
        _check_banks("state.start", state.start, (B, H), q, rule)
        if (logits.theta is None) != (state.momentum is None):
            there = "has none" if state.momentum is None else "has one"
            raise MemoryRuleError(
                f"momentum goes with theta: logits.theta is {_shape(logits.theta)}, the state {there}"
            )
        if state.momentum is not None:
            _check_banks("state.momentum", state.momentum, (B, H), q, rule)


def _check_banks(where: str, params: MemoryParams, leading: tuple[int, ...], q: Tensor, rule: MemoryRule) -> None:
    """The banks that the rule names, and no other, each of n memories with the widths of M_mem."""
    d = q.size(-1)
    h = d if params.mem is None or params.mem.w_in is None or params.mem.w_in.dim() < 2 else params.mem.w_in.size(-2)
    for name, n, outputs in (("mem", 1, d), ("vector", rule.num_vector, d), ("scalar", rule.num_scalar, 1)):
        bank = getattr(params, name)
        if bank is None or n == 0:
            if bank is not None or n:
                here = "is missing" if bank is None else "is there"
                raise MemoryRuleError(f"{where}.{name} {here}, but the rule has {n} such memories (adaptive_*)")
            continue
        two_layers = rule.num_layers == 2
        if (bank.w_in is not None) != two_layers:
            raise MemoryRuleError(
                f"{where}.{name}.w_in is {_shape(bank.w_in)}, but the rule has num_layers={rule.num_layers}"
            )
        if two_layers:
            _expect(f"{where}.{name}.w_in", bank.w_in, (*leading, n, h, d), q)
        _expect(f"{where}.{name}.w_out", bank.w_out, (*leading, n, outputs, h), q)


def _expect(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if x.shape != shape:
        raise MemoryRuleError(f"{name} has shape {list(x.shape)}; expected {list(shape)}, from q {list(like.shape)}")
    if x.device != like.device:
        raise MemoryRuleError(f"{name} is on {x.device}, q on {like.device}; move one of them")
    if not x.is_floating_point():
        raise MemoryRuleError(f"{name} holds {x.dtype}; expected a floating-point type")


def _shape(x: Tensor | None) -> str:
    return "None" if x is None else str(list(x.shape))
