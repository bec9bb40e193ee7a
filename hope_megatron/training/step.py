"""One training step, from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from hope_megatron.config.run import RunConfig
from hope_megatron.engine.engine import Engine, NonFiniteError
from hope_megatron.eval.token_kinds import METRICS, repetition_kinds
from hope_megatron.optim import lr_at
from hope_megatron.runtime.heartbeat import HEART
from hope_megatron.training.batches import IGNORE, BatchReader, document_numbers
from hope_megatron.training.guard import Guard, Judgement
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
    judgement: Judgement = Judgement.GOOD
    """Of the gradient, as it was computed first."""
    skipped: bool = False
    """Whether the update was refused; then nothing changed but the clocks of the run."""
    recomputed: bool = False
    """Whether the step was computed a second time."""
    spike: bool = False
    """Whether the loss has been far too high for so many steps that this is a spike."""
    stop_signal: int = 0
    """The largest signal that asked a rank to end the run before this update."""


def train_step(
    engine: Engine,
    reader: BatchReader,
    state: TrainingState,
    config: RunConfig,
    stop_signal: Callable[[], int] = int,
) -> StepResult:
    """Take the next global batch, and update the parameters by the gradient of its mean loss.

    A gradient that is not finite, or extreme, is computed once more: what a machine got wrong once, it mostly gets right then.
    If it comes again, all ranks skip the step together, before any parameter or optimizer state has changed.

    The host waits for the device once: it reads norm, loss, tokens and stop signals together, the same on all ranks.

    Args:
        stop_signal: the signal that asks this process to end the run, or 0; asked after backward.

    Raises:
        NonFiniteError: on all ranks, when the rules of the run (`resilience.bad_step`) do not let it skip, or no longer.
    """
    training, mesh = config.training, engine.mesh
    guard = Guard(config.resilience.bad_step, config.resilience.spike)

    HEART.enter("data")
    # This rank's part of the global batch is a pure function of the samples consumed so far.
    batches = reader.take(state.samples, is_last=state.step + 1 >= training.steps)

    # The loss is a mean over the valid tokens of all ranks and micro-batches, so they are counted first.
    valid = torch.stack([(targets != IGNORE).sum() for _, targets in batches]).sum()
    valid = engine.sum_over_data_parallel(valid).clamp(min=1)

    multiplier = learning_rate_multiplier(state.step, config)
    judgements: list[Judgement] = []
    while True:
        loss_sum = torch.zeros((), device=mesh.device)
        for tokens, targets in batches:
            loss_sum += engine.forward_backward(tokens, targets, valid, reader.documents(tokens))
        judgements.append(Judgement.NONFINITE)  # unless the norm is finite, so that somebody asks

        def beside(loss_sum: torch.Tensor = loss_sum) -> list[torch.Tensor | float]:
            HEART.enter("agree")
            return [engine.global_loss(loss_sum), valid, stop_signal()]

        def accept(norm: float) -> bool:
            judgements[-1] = guard.judge(state, engine.read_beside[0], norm)
            return not guard.refuses(judgements[-1])

        grad_norm = engine.step(multiplier, accept, beside)
        if not engine.skipped or len(judgements) == 2 or guard.bad_step.nonfinite == "off":
            break

    total_loss, num_tokens, signal = engine.read_beside[0], *map(int, engine.read_beside[1:])
    loss = total_loss / num_tokens
    if engine.skipped:
        _may_skip(state, guard, judgements[-1], loss)
    state.step += 1
    state.samples += training.global_batch_size
    spike = False
    if engine.skipped:
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
    else:
        state.tokens += num_tokens
        spike = guard.accept(state, loss, grad_norm)
    return StepResult(loss, grad_norm, multiplier, judgements[0], engine.skipped, len(judgements) == 2, spike, signal)


def _may_skip(state: TrainingState, guard: Guard, judgement: Judgement, loss: float) -> None:
    """Refuse to skip where the rules end the run instead."""
    rules = guard.bad_step
    if judgement is Judgement.NONFINITE and rules.nonfinite != "act":
        what = (
            "gradient norm is NaN or infinite, though the loss is finite"
            if math.isfinite(loss)
            else "loss is NaN or infinite"
        )
        raise NonFiniteError(f"the {what}")
    if state.skipped_in_a_row >= rules.max_in_a_row:
        raise NonFiniteError(
            f"{state.skipped_in_a_row + 1} steps in a row were bad ({judgement.name.lower()} gradients; "
            f"resilience.bad_step.max_in_a_row={rules.max_in_a_row})"
        )


def learning_rate_multiplier(step: int, config: RunConfig) -> float:
    """What the schedule makes of every base learning rate at a step (0 is the first)."""
    return lr_at(step, SimpleNamespace(**config.optim.model_dump(), total_steps=config.training.steps))


def evaluate(engine: Engine, batches, end_id: int | None = None) -> dict[str, float]:
    """Mean loss in nats per token over batches of (tokens, targets), as `heldout_batches` gives them.

    Args:
        end_id: read documents, which end with this token, apart.

    Returns:
        `heldout/loss`, and that of each kind of target (`KINDS` of hope_megatron/eval/token_kinds.py) that occurs. Ranks
        that hold parts of sequences do not see what repeats, so that context parallelism has the first alone.
    """
    names = ("heldout/loss",) if engine.mesh.cp_size > 1 else ("heldout/loss", *METRICS)
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=engine.mesh.device)
    for tokens, targets in batches:
        documents = None if end_id is None else document_numbers(tokens, end_id, engine.mesh)
        masks = []
        if len(names) > 1:
            kinds = repetition_kinds(tokens, targets)
            masks = [kinds == number for number in range(len(METRICS))]
        sums += engine.evaluate(tokens, targets, documents, masks=masks)
    return {name: loss_sum / count for name, (loss_sum, count) in zip(names, sums.tolist()) if count}
