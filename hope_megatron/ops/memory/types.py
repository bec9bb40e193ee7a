"""The vocabulary of the memory operator.

Shapes: B sequences, T tokens, C tokens of a chunk, H heads, d head width, h memory hidden width, n memories in a bank,
o outputs of a memory (d for vector memories, 1 for scalar ones).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class MemoryRule:
    """How memories learn and are read. Static: one rule per layer.

    Symbols and equation numbers are those of "Nested Learning" (arXiv 2512.24695).
    """

    chunk_tokens: int = 32
    """C of M_mem: inner gradients are taken at the state that stood at the chunk's start (eqs. 90-93)."""
    self_chunk_tokens: int = 32
    """C of the self-memories M_k, M_v, M_eta, M_alpha."""
    objective: Literal["dot", "l2"] = "dot"
    """Inner loss: -<M(k), v> or 0.5 |M(k) - v|^2."""
    written_layers: Literal["all", "output"] = "all"
    """Layers that a stream changes. "output": the input layer, and with it every key's features, stays as it was learned."""
    dgd_layers: Literal["none", "input", "all"] = "all"
    """Layers with the Delta Gradient Descent term (eq. 88). "all": the output layer too, keyed by its unit features."""
    decay_erased: bool = False
    """Whether retention also scales what DGD erases: W alpha (I - eta k k^T), the gated delta rule, instead of eq. 88."""
    decay_to: Literal["zero", "initial"] = "zero"
    """What retention forgets towards: W alpha, or W_0 + (W - W_0) alpha, which keeps the learned initial state W_0."""
    own_targets: bool = True
    """Targets are M(v) of each memory, or v. Scalar memories always write their own: v has no scalar part."""
    dot_target: Literal["residual", "full"] = "residual"
    """Under "dot", what a memory with a skip learns through its layers: v - k, or v."""
    adaptive_key: bool = True
    adaptive_value: bool = True
    adaptive_eta: bool = True
    adaptive_alpha: bool = True
    """Which self-memories exist; a bank holds those that do, in this order (k, v | eta, alpha)."""
    normalize_values: bool = True
    """v = unit(M_v(x))."""
    normalize_targets: bool = True
    """Own targets: unit(M(v)) for vector memories, tanh(M(v)) for scalar ones."""
    normalize_steps: bool = True
    """Two layers under "l2": no token's step passes Polyak's, whatever the size of features and weights (`step_scale`)."""
    read: Literal["causal", "chunk_start"] = "causal"
    """y_t = M_t(q_t), or M_mem as it stood at the chunk's start."""
    read_skip: bool = False
    """Whether y includes the skip connection q (two-layer memories)."""
    eta_max: float = 1.0
    """Upper bound of the inner learning rate; the rate itself where it has no logits."""
    theta_max: float = 1.0
    """Upper bound of the momentum's decay: theta = theta_max sigmoid(logit)."""


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
    vector: Bank | None = None  # M_k, M_v
    scalar: Bank | None = None  # M_eta, M_alpha; o = 1


class RateLogits(NamedTuple):
    """Static parts of the rates before their sigmoids, each [B, T, H]."""

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
