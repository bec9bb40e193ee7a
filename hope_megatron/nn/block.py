"""A layer of HOPE, and its MLP alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hope_megatron.nn import layers
from hope_megatron.nn.neural_memory import check_input, map_state
from hope_megatron.nn.sizes import cms, one_layer, reset_parameters


class BlockState(NamedTuple):
    """Where the streams of a batch stand. Constant in size for memories; keys and values grow with attention's window."""

    mixer: Any
    num_tokens: int
    """Tokens read so far."""

    def detach(self) -> BlockState:
        """Cut from the autograd graph."""
        return map_state(Tensor.detach, self)

    def to(self, device: torch.device | str) -> BlockState:
        """On another device."""
        return map_state(lambda x: x.to(device), self)

    def select(self, rows: Tensor) -> BlockState:
        """The streams of rows [n] int64; a row may be there more than once."""
        return map_state(lambda x: x[rows.to(x.device)], self)


class ContinuumMLP(layers.ContinuumMLP):
    """The continuum memory system in the place of an MLP: x [B, T, dim] -> the same shape, norms and residuals included.

    `update_periods` are clocks of the optimizer: those of `hope_megatron.optim` update a level every so many steps.

    Args:
        dim: width D.
        hidden_sizes: hidden width of each level, fastest first; None means one of 4 dim.
        update_periods: optimizer steps between two updates of each level; None means 1 for all.
        activation: "swiglu", "silu" or "gelu".
        connection: "sequential" (eq. 73) or "independent" (eq. 74).
    """

    def __init__(
        self,
        dim: int,
        hidden_sizes: Sequence[int] | None = None,
        *,
        update_periods: Sequence[int] | None = None,
        activation: str = "swiglu",
        connection: str = "sequential",
        norm_epsilon: float = 1e-6,
        init_std: float = 0.02,
    ) -> None:
        levels = cms("ContinuumMLP", dim, hidden_sizes, update_periods, activation=activation, connection=connection)
        super().__init__(one_layer("ContinuumMLP", dim, cms=levels, norm_epsilon=norm_epsilon, init_std=init_std))
        reset_parameters(self)


class HopeBlock(layers.HopeLayer):
    """x + Mixer(norm(x)), then the continuum memory system: x [B, T, dim] -> y of the same shape, and the state.

        y, state = HopeBlock(dim=256, num_heads=4)(x)

    Args:
        dim, num_heads, head_dim: as for NeuralMemory.
        hidden_sizes, update_periods, activation, connection: as for ContinuumMLP.
        mixer: "memory" (HOPE) or "attention".
        memory: keys of `model.memory`, for example {"chunk_tokens": 64}.
        attention: keys of `model.attention`, for example {"window_tokens": 512}.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        hidden_sizes: Sequence[int] | None = None,
        update_periods: Sequence[int] | None = None,
        activation: str = "swiglu",
        connection: str = "sequential",
        mixer: str = "memory",
        memory: Mapping[str, Any] | None = None,
        attention: Mapping[str, Any] | None = None,
        norm_epsilon: float = 1e-6,
        init_std: float = 0.02,
    ) -> None:
        levels = cms("HopeBlock", dim, hidden_sizes, update_periods, activation=activation, connection=connection)
        model = one_layer(
            "HopeBlock",
            dim,
            num_heads,
            head_dim=head_dim,
            mixer=mixer,
            cms=levels,
            memory=memory,
            attention=attention,
            norm_epsilon=norm_epsilon,
            init_std=init_std,
        )
        super().__init__(model, mixer)
        self.dim = dim
        reset_parameters(self)

    def forward(self, x: Tensor, state: BlockState | None = None) -> tuple[Tensor, BlockState]:  # type: ignore[override]
        """As NeuralMemory.forward."""
        check_input(self, x)
        mixer, before = (state.mixer, state.num_tokens) if state is not None else (None, 0)
        y, after = super().forward(x, mixer, before)
        return y, BlockState(after, before + x.size(1))
