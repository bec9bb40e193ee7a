"""Loss and perplexity of a model over a held-out token stream, every target scored exactly once.

The stream is cut into rows, each read from the initial state. Rows as long as training sequences measure what training
measured; longer ones how the model extrapolates; one row per stream of the batch reads everything as one text. Sliding rows
overlap, so that every target has a full context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from hope_megatron.model import IGNORE

_TEXT_PIECE = 1 << 16  # tokens decoded at a time when text is measured


class EvaluationError(ValueError):
    """Held-out data or a setting that cannot be evaluated. The message names the values and the remedy."""

    is_user_error = True


class TextSize(NamedTuple):
    """How much text some tokens spell."""

    num_bytes: int
    num_words: int


@dataclass(frozen=True)
class HeldoutScore:
    """Sums over the scored targets; every figure that is quoted derives from them.

    Attributes:
        num_tokens: scored target tokens.
        nats: total loss over them.
        num_bytes, num_words: UTF-8 bytes and whitespace-separated words of the text they spell; 0 when not measured.
    """

    num_tokens: int
    nats: float
    num_bytes: int = 0
    num_words: int = 0

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """Per token; infinite where the loss is beyond float range."""
        return _exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable across tokenizers; None when bytes were not measured."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else None

    @property
    def byte_perplexity(self) -> float | None:
        """Perplexity per UTF-8 byte; None when bytes were not measured."""
        return _exp(self.nats / self.num_bytes) if self.num_bytes else None

    @property
    def word_perplexity(self) -> float | None:
        """Perplexity per whitespace-separated word, as WikiText is reported; None when words were not measured."""
        return _exp(self.nats / self.num_words) if self.num_words else None

    def as_dict(self) -> dict[str, float | int | None]:
        """Sums and derived figures, for reports."""
        derived = ("loss", "perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity")
        return asdict(self) | {name: getattr(self, name) for name in derived}


@torch.no_grad()
def score_heldout(
    model: nn.Module,
    tokens: np.ndarray,
    *,
    context_tokens: int | None,
    window_tokens: int,
    batch_size: int = 8,
    stride_tokens: int | None = None,
    learn: bool = False,
) -> np.ndarray:
    """Loss of every target of a token stream.

    Args:
        model: a `LanguageModel`; put into eval mode for the duration.
        tokens: [n + 1] integer ids; token i is the context of target i + 1.
        context_tokens: the stream is cut into rows of this length, each read from the initial state. None cuts it into
            `batch_size` rows.
        window_tokens: tokens per forward pass and row; the state is carried along the row. Bounds memory, changes nothing.
        batch_size: rows per forward pass.
        stride_tokens: rows of `context_tokens` begin this many tokens after one another, and all but the first score only
            their last `stride_tokens` targets: the others are context. None: rows do not overlap.
        learn: the model learns in context as it reads a row; windows are then whole segments of its fastest inner clock.

    Returns:
        [n] float64, nats of targets tokens[1:], in order.

    Raises:
        EvaluationError: fewer than two tokens, or sizes that are not positive.
    """
    num_targets = len(tokens) - 1
    if num_targets < 1:
        raise EvaluationError(f"{len(tokens)} held-out tokens: at least 2 are needed to score one; give more text")
    if min(window_tokens, batch_size, 1 if context_tokens is None else context_tokens) < 1:
        raise EvaluationError(
            f"context={context_tokens}, window={window_tokens} and batch={batch_size} must be positive"
        )
    if stride_tokens is not None and (context_tokens is None or not 1 <= stride_tokens <= context_tokens):
        raise EvaluationError(
            f"a stride of {stride_tokens} tokens with a context of {context_tokens}: sliding needs a context of so many "
            "tokens, and a stride between 1 and that"
        )
    if learn:
        segment = model.model_config.cms.inner_segment_tokens
        window_tokens = max(1, window_tokens // segment) * segment
    learning = {"learn": True} if learn else {}  # a plain model need not know the word
    length = row_tokens(num_targets, context_tokens, batch_size)
    inputs, targets = _rows(tokens, length) if stride_tokens is None else _sliding_rows(tokens, length, stride_tokens)
    losses = np.zeros(inputs.shape)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for row in range(0, inputs.shape[0], batch_size):
            state = None
            for column in range(0, inputs.shape[1], window_tokens):
                piece = (slice(row, row + batch_size), slice(column, column + window_tokens))
                x, y = (torch.from_numpy(ids[piece]).to(device) for ids in (inputs, targets))
                output = model(x, targets=y, state=state, return_state=True, **learning)
                state = output.state
                losses[piece] = output.losses.double().cpu().numpy()
    finally:
        model.train(was_training)
    return losses[targets != IGNORE]


def row_tokens(num_targets: int, context_tokens: int | None, batch_size: int) -> int:
    """Length of the rows that `score_heldout` cuts its stream into: target i stands at position i modulo this."""
    return (
        -(-num_targets // min(batch_size, num_targets)) if context_tokens is None else min(context_tokens, num_targets)
    )


def loss_by_position(losses: np.ndarray, row_length: int, first_edge: int) -> list[dict[str, float | int]]:
    """Mean loss by position in the row, in doubling ranges [0, first_edge), [first_edge, 2 first_edge), ...

    Args:
        losses: [n] as `score_heldout` returns them.
        row_length: see `row_tokens`.
        first_edge: for length extrapolation, the sequence length in training.
    """
    positions = np.arange(len(losses)) % row_length
    ranges = []
    start, stop = 0, first_edge
    while start < row_length:
        inside = losses[(positions >= start) & (positions < stop)]
        if inside.size:
            ranges.append(
                {"from": start, "to": min(stop, row_length), "tokens": inside.size, "loss": float(inside.mean())}
            )
        start, stop = stop, 2 * stop
    return ranges


def heldout_score(losses: np.ndarray, text: TextSize | None = None) -> HeldoutScore:
    """Add up losses [n] in nats, of targets that spell a text of this size."""
    return HeldoutScore(len(losses), float(losses.sum()), *(text or ()))


def text_size(tokens: np.ndarray, decode: Callable[[list[int]], str], end_id: int) -> TextSize:
    """Bytes and words of the text that tokens [n] spell; `end_id` ends a document and spells nothing."""
    num_bytes = num_words = 0
    for piece in _documents(tokens, end_id):
        text = decode(piece)
        num_bytes += len(text.encode("utf-8", errors="replace"))
        num_words += len(text.split())
    return TextSize(num_bytes, num_words)


def _rows(tokens: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets [R, row_tokens], consecutive in memory order; the tail of the last row is not scored."""
    num_targets = len(tokens) - 1
    num_rows = -(-num_targets // row_tokens)
    inputs = np.zeros(num_rows * row_tokens, dtype=np.int64)
    targets = np.full(num_rows * row_tokens, IGNORE, dtype=np.int64)
    inputs[:num_targets], targets[:num_targets] = tokens[:-1], tokens[1:]
    return inputs.reshape(num_rows, row_tokens), targets.reshape(num_rows, row_tokens)


def _sliding_rows(tokens: np.ndarray, row_tokens: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping rows [R, row_tokens]: each target once, in the first row that reaches it, with all the context of that row."""
    num_targets = len(tokens) - 1
    num_rows = 1 + -(-(num_targets - row_tokens) // stride)
    at = stride * np.arange(num_rows)[:, None] + np.arange(row_tokens)
    at -= np.maximum(at[:, -1:] - (num_targets - 1), 0)  # the last row ends at the last target
    first = np.append(0, at[:-1, -1] + 1)[:, None]
    return tokens[:-1][at].astype(np.int64), np.where(at >= first, tokens[1:][at], IGNORE).astype(np.int64)


def _documents(tokens: np.ndarray, end_id: int) -> Iterator[list[int]]:
    """Pieces of the stream between end marks, long ones cut so that decoding stays linear."""
    ends = np.flatnonzero(tokens == end_id)
    for start, end in zip(np.append(0, ends + 1), np.append(ends, len(tokens))):
        for at in range(int(start), int(end), _TEXT_PIECE):
            yield tokens[at : min(at + _TEXT_PIECE, int(end))].tolist()


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
