"""Asking a model about sequences of any length, read in pieces with the state carried on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hope_megatron.model import LanguageModel
from hope_megatron.suites.task import IGNORE

PIECE_TOKENS = 256


class Answers(NamedTuple):
    """What became of each sequence's answers."""

    asked: Tensor  # [B] how many
    right: Tensor  # [B] how many were the most likely token
    nats: Tensor  # [B] loss over them, summed


@torch.no_grad()
def streamed_answers(model: LanguageModel, tokens: Tensor, targets: Tensor, piece: int = PIECE_TOKENS) -> Answers:
    """Answers of sequences [B, T]. Logits are held for one piece; memory layers keep a state of one size at any T."""
    model.eval()
    state, zeros = None, torch.zeros(len(tokens), device=tokens.device)
    asked, right, nats = zeros.clone(), zeros.clone(), zeros.clone()
    for x, y in zip(tokens.split(piece, 1), targets.split(piece, 1)):
        output = model(x, state=state, return_state=True)
        state, mask = output.state, y != IGNORE
        if mask.any():
            log_probs = output.logits.log_softmax(-1).gather(2, y.clamp(min=0).unsqueeze(2)).squeeze(2)
            asked += mask.sum(1)
            right += ((output.logits.argmax(-1) == y) & mask).sum(1)
            nats -= (log_probs * mask).sum(1)
    return Answers(asked, right, nats)
