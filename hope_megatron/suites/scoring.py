"""How a batch is scored, whatever split it comes from."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hope_megatron.model import LanguageModel
from hope_megatron.suites.streamed import streamed_answers
from hope_megatron.suites.task import IGNORE, Batch

_PIECE_TOKENS = 1024


class Score(NamedTuple):
    """What a model makes of a batch."""

    value: float
    """By the task's metric: a share from 0 to 1, or nats."""
    nats: float
    """Mean loss per answer."""


def batch_loss(model: LanguageModel, batch: Batch) -> Tensor:
    """Nats per answer, a scalar with gradient."""
    tokens, targets = on_device(model, batch)
    return model(tokens, targets).losses.sum() / (targets != IGNORE).sum()


@torch.no_grad()
def score_batch(model: LanguageModel, batch: Batch, metric: Literal["sequences", "answers", "loss"]) -> Score:
    """Long sequences are read in pieces, the state carried on."""
    model.eval()
    answers = streamed_answers(model, *on_device(model, batch), piece=_PIECE_TOKENS)
    nats = (answers.nats.sum() / answers.asked.sum()).item()
    if metric == "loss":
        return Score(nats, nats)
    if metric == "sequences":
        return Score((answers.right == answers.asked).float().mean().item(), nats)
    return Score((answers.right.sum() / answers.asked.sum()).item(), nats)


def on_device(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Tokens and targets as tensors where the model is."""
    device = next(model.parameters()).device
    return torch.from_numpy(batch.tokens).to(device), torch.from_numpy(batch.targets).to(device)
