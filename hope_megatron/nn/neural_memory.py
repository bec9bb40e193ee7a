"""Self-modifying memories as one layer: x [B, T, dim] -> y of the same shape, and a state of constant size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hope_megatron.nn.layers import MemoryMixer
from hope_megatron.nn.sizes import one_layer, reset_parameters
from hope_megatron.ops.memory.types import MemoryState


def map_state(fn: Any, state: Any) -> Any:
    """`fn` on every tensor of a state."""
    return tree_map(lambda x: fn(x) if isinstance(x, Tensor) else x, state)


class NeuralMemoryState(NamedTuple):
    """Where the streams of a batch stand: what a layer has read, in as many bytes after a million tokens as after one."""

    conv: Tensor | None
    """The last inputs of the convolution, [B, width - 1, 3 heads head_dim]."""
    memory: MemoryState
    """Weights of the memories, by stream and head, float32 (float64 for a layer in float64)."""

    @property
    def num_tokens(self) -> int:
        """Tokens read so far."""
        return self.memory.position

    def detach(self) -> NeuralMemoryState:
        """Cut from the autograd graph: truncated backpropagation through the stream."""
        return map_state(Tensor.detach, self)

    def to(self, device: torch.device | str) -> NeuralMemoryState:
        """On another device."""
        return map_state(lambda x: x.to(device), self)

    def select(self, rows: Tensor) -> NeuralMemoryState:
        """The streams of rows [n] int64; a row may be there more than once."""
        return map_state(lambda x: x[rows.to(x.device)], self)


class NeuralMemory(MemoryMixer):
    """The recurrent mixer of HOPE: associative memories that learn while they read (arXiv 2512.24695, eqs. 83-93).

        y, state = NeuralMemory(dim=256, num_heads=4)(x)
        y, state = layer(x_next, state)

    Parameters have the names and shapes of the Megatron-Core layer: `layers.N.mixer.*` of a checkpoint loads strictly.

    Args:
        dim: width D of input and output.
        num_heads: heads; each has memories of its own.
        head_dim: width of a head; None means dim / num_heads.
        norm_epsilon, init_std: as in a run file's `model` section.
        memory: any key of the section `model.memory` (docs/configuration.md), for example chunk_tokens=64 or, for a gated
            DeltaNet, num_layers=1. The defaults are HOPE.

    Raises:
        ConfigError: sizes or keys that do not exist or do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        norm_epsilon: float = 1e-6,
        init_std: float = 0.02,
        **memory: Any,
    ) -> None:
        settings: dict[str, Any] = dict(head_dim=head_dim, memory=memory, norm_epsilon=norm_epsilon, init_std=init_std)
        super().__init__(one_layer("NeuralMemory", dim, num_heads, **settings))
        self.dim = dim
        reset_parameters(self)

    def forward(self, x: Tensor, state: NeuralMemoryState | None = None) -> tuple[Tensor, NeuralMemoryState]:  # type: ignore[override]
        """Read a piece of each stream.

        Args:
            x: [B, T, dim], any T of at least 1.
            state: what an earlier call returned for these streams; None begins new ones. It is left as it was.

        Returns:
            y [B, T, dim] in x's dtype, and the state after the last token; both differentiable.
        """
        check_input(self, x)
        y, after = super().forward(x, state, state.num_tokens if state is not None else 0)
        return y, NeuralMemoryState(*after)


def check_input(layer: Any, x: Tensor) -> None:
    """Refuse what is no [B, T, dim]."""
    if x.dim() != 3 or x.size(-1) != layer.dim or x.size(1) == 0:
        raise ValueError(
            f"{type(layer).__name__} got x of shape {list(x.shape)}; expected [batch, tokens, {layer.dim}] with at least one token"
        )
