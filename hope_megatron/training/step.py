"""One training step, from top to bottom."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from hope_megatron.config.run import RunConfig
from hope_megatron.engine.engine import Engine
from hope_megatron.optim import lr_at
from hope_megatron.training.batches import IGNORE, BatchReader, document_numbers
from hope_megatron.training.state import TrainingState


@dataclass(frozen=True)
class StepResult:
    """What a step measured; the same on all ranks."""

    loss: float
    """Mean over the valid tokens of the global batch, nats, at the weights before the update."""
    grad_norm: float
    """Global norm before clipping."""
    lr_multiplier: float
    """What the schedule made of every base learning rate."""


def train_step(engine: Engine, reader: BatchReader, state: TrainingState, config: RunConfig) -> StepResult:
    """Take the next global batch, and update the parameters by the gradient of its mean loss.

    Raises:
        NonFiniteError: on all ranks together, before any parameter or optimizer state has changed.
    """
    training, mesh = config.training, engine.mesh

    # This rank's part of the global batch is a pure function of the samples consumed so far.
    batches = reader.take(state.samples, is_last=state.step + 1 >= training.steps)

    # The loss is a mean over the valid tokens of all ranks and micro-batches, so they are counted first.
    valid = torch.stack([(targets != IGNORE).sum() for _, targets in batches]).sum()
    valid = engine.sum_over_data_parallel(valid).clamp(min=1)

    loss_sum = torch.zeros((), device=mesh.device)
    for tokens, targets in batches:
        loss_sum += engine.forward_backward(tokens, targets, valid, reader.documents(tokens))
    engine.check_finite(loss_sum)

    multiplier = learning_rate_multiplier(state.step, config)
    grad_norm = engine.step(multiplier)

    num_tokens = int(valid)
    loss = float(engine.sum_over_data_parallel(loss_sum)) / num_tokens
    state.step += 1
    state.samples += training.global_batch_size
    state.tokens += num_tokens
    return StepResult(loss, grad_norm, multiplier)


def learning_rate_multiplier(step: int, config: RunConfig) -> float:
    """What the schedule makes of every base learning rate at a step (0 is the first)."""
    return lr_at(step, SimpleNamespace(**config.optim.model_dump(), total_steps=config.training.steps))


def evaluate(engine: Engine, batches, end_id: int | None = None) -> float:
    """Mean loss in nats per token over batches of (tokens, targets), as `heldout_batches` gives them.

    end_id: read documents, which end with this token, apart.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=engine.mesh.device)
    for tokens, targets in batches:
        documents = None if end_id is None else document_numbers(tokens, end_id)
        sums += engine.evaluate(tokens, targets, documents)
    loss_sum, num_tokens = sums.tolist()
    return loss_sum / num_tokens
