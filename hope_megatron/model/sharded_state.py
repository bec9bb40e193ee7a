"""The model's parameters as Megatron-Core's distributed checkpointing wants them: shards with their place in the whole.

Made from what layers declare of their parameters, so that one rule holds for all of them. Megatron-Core's own default
knows no fused parts: gate and up of two ranks would be stored as gate, up, gate, up.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor, nn


def sharded_parameters(model: nn.Module, prefix: str = "") -> dict[str, Any]:
    """A sharded state dict of all parameters, to be saved or loaded on all ranks together."""
    return {f"{prefix}{name}": _sharded(f"{prefix}{name}", parameter) for name, parameter in model.named_parameters()}


def _sharded(key: str, parameter: nn.Parameter) -> Any:
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    dp_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    data = parameter.detach()
    if not getattr(parameter, "tensor_model_parallel", False):
        return ShardedTensor.from_rank_offsets(key, data, replica_id=(0, tp_rank, dp_rank))
    dim, parts = parameter.partition_dim, parameter.partition_stride

    def build(name: str, tensor: Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
        """The rank's slice of each fused part, at its place among the slices of all ranks."""
        return [
            ShardedTensor.from_rank_offsets(
                name, piece, (dim, part * tp_size + tp_rank, parts * tp_size), replica_id=replica_id
            )
            for part, piece in enumerate(tensor.chunk(parts, dim))
        ]

    if parts == 1:
        return build(key, data, (0, 0, dp_rank), None)[0]
    return ShardedTensorFactory(key, data, build, lambda pieces: torch.cat(pieces, dim), replica_id=(0, 0, dp_rank))
