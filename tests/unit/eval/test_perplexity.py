"""Every target is scored exactly once, with the context the mode promises."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hope_megatron.eval.perplexity import (
    EvaluationError,
    HeldoutScore,
    heldout_score,
    loss_by_position,
    score_heldout,
    text_size,
)


class SumOfContext(nn.Module):
    """A recurrent model whose loss tells what it saw: 1000 * (sum of the context so far) + target."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, tokens, targets=None, state=None, return_state=False):
        assert not self.training and not torch.is_grad_enabled()
        carried = torch.zeros(tokens.size(0), 1, dtype=torch.int64) if state is None else state
        sums = carried + tokens.cumsum(1)
        losses = torch.where(targets == -100, 0, 1000 * sums + targets).double()
        return SimpleNamespace(losses=losses, state=sums[:, -1:] if return_state else None)


TOKENS = np.random.default_rng(0).integers(1, 50, size=38)


@pytest.mark.parametrize("context_tokens", [1, 5, 37, 100])
@pytest.mark.parametrize("window_tokens", [2, 5, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_rows_see_only_themselves(context_tokens: int, window_tokens: int, batch_size: int) -> None:
    losses = score_heldout(
        SumOfContext(), TOKENS, context_tokens=context_tokens, window_tokens=window_tokens, batch_size=batch_size
    )
    expected = [1000 * TOKENS[i - i % context_tokens : i + 1].sum() + TOKENS[i + 1] for i in range(37)]
    assert losses.tolist() == expected


@pytest.mark.parametrize("window_tokens", [1, 5, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_streams_see_everything_before(window_tokens: int, batch_size: int) -> None:
    losses = score_heldout(
        SumOfContext(), TOKENS, context_tokens=None, window_tokens=window_tokens, batch_size=batch_size
    )
    part = -(-37 // min(batch_size, 37))  # each stream reads its own part
    expected = [1000 * TOKENS[i - i % part : i + 1].sum() + TOKENS[i + 1] for i in range(37)]
    assert losses.tolist() == expected


@pytest.mark.parametrize("context_tokens, stride", [(8, 3), (8, 8), (5, 1), (37, 4), (100, 10)])
@pytest.mark.parametrize("window_tokens", [3, 100])
def test_sliding_rows_score_each_target_once_with_full_context(context_tokens, stride, window_tokens) -> None:
    losses = score_heldout(
        SumOfContext(),
        TOKENS,
        context_tokens=context_tokens,
        window_tokens=window_tokens,
        batch_size=4,
        stride_tokens=stride,
    )
    assert losses.shape == (37,)
    contexts = [(loss - target) / 1000 for loss, target in zip(losses, TOKENS[1:])]
    for i, context in enumerate(contexts):
        lengths = [n for n in range(1, i + 2) if TOKENS[i + 1 - n : i + 1].sum() == context]
        least = min(i + 1, min(context_tokens, 37) - stride + 1)
        assert any(least <= n <= context_tokens for n in lengths), i


def test_a_stride_needs_a_context_that_holds_it() -> None:
    for context_tokens, stride in ((None, 4), (8, 9), (8, 0)):
        with pytest.raises(EvaluationError, match="stride"):
            score_heldout(SumOfContext(), TOKENS, context_tokens=context_tokens, window_tokens=8, stride_tokens=stride)


def test_loss_by_position_averages_doubling_ranges() -> None:
    losses = np.array([0, 0, 1, 1, 5, 5, 5, 5, 9, 0, 2, 1, 3, 4], dtype=float)  # rows of 9 and 5
    assert loss_by_position(losses, 9, first_edge=2) == [
        {"from": 0, "to": 2, "tokens": 4, "loss": 0.5},
        {"from": 2, "to": 4, "tokens": 4, "loss": 1.5},
        {"from": 4, "to": 8, "tokens": 5, "loss": 4.8},
        {"from": 8, "to": 9, "tokens": 1, "loss": 9.0},
    ]


def test_training_mode_comes_back() -> None:
    model = SumOfContext().train()
    score_heldout(model, TOKENS, context_tokens=8, window_tokens=8)
    assert model.training


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(EvaluationError, match="at least 2"):
        score_heldout(SumOfContext(), TOKENS[:1], context_tokens=8, window_tokens=8)


def test_score_derives_every_figure_from_the_sums() -> None:
    score = HeldoutScore(num_tokens=4, nats=4 * math.log(8.0), num_bytes=6, num_words=2)
    assert score.loss == pytest.approx(math.log(8))
    assert score.perplexity == pytest.approx(8)
    assert score.bits_per_byte == pytest.approx(2)  # 4 tokens of 3 bits over 6 bytes
    assert score.word_perplexity == pytest.approx(64)
    assert HeldoutScore(1, 2.0).bits_per_byte is None


def test_text_is_measured_without_end_marks() -> None:
    tokens = np.array([1, 2, 0, 0, 3, 0])  # 0 ends a document
    words = {1: "héllo ", 2: "world", 3: "x"}
    size = text_size(tokens, lambda ids: "".join(words[i] for i in ids), end_id=0)
    assert size == (len("héllo worldx".encode()), 3)
    score = heldout_score(np.ones(6), size)
    assert (score.num_tokens, score.nats, score.num_bytes, score.num_words) == (6, 6.0, *size)
