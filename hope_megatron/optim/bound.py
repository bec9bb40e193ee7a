"""A vector that an optimizer steps, and what is known of the parameters in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hope_megatron.config.matrices.plan import ParamLayout
from hope_megatron.optim.exchange import MatrixExchange


@dataclass
class BoundVector:
    """A tensor the optimizer steps (ZeRO's flat vector, or a plain parameter seen flat) and what it knows about it."""

    tensor: Tensor
    group_name: str
    params: list[ParamLayout]
    dp_group: Any
    dp_rank: int
    exchange: MatrixExchange | None
    """None where nothing is orthogonalised."""
    update_norm: Tensor | None = None
    """Frobenius norm of this rank's part of the last update, before the learning rate."""
    changes: dict[str, Tensor] = field(default_factory=dict)
    """By parameter: sums of squares of the last measured update and of the weights, of this rank's part."""
    agreement: Tensor | None = None
    """Of an adaptive level's matrices, in a step that updates them: <G, M>, |G|^2, |M|^2 of gradient and momentum, of this rank."""
    numel: int = field(init=False)

    def __post_init__(self) -> None:
        self.numel = sum(run.numel for param in self.params for run in param.runs if run.dp_rank == self.dp_rank)

    def measure(self, update: Tensor, lr: float) -> None:
        """Note how much an update changes each parameter."""
        flat = self.tensor.view(-1)
        for param in self.params:
            runs = [slice(r.flat_start, r.flat_start + r.numel) for r in param.runs if r.dp_rank == self.dp_rank]
            squares = [torch.stack([(lr * update[run]).square().sum(), flat[run].square().sum()]) for run in runs]
            self.changes[param.name] = torch.stack(squares).sum(0) if squares else flat.new_zeros(2)
