"""Unigram and bigram language models: what a trained model must beat to have learned anything.

Both are counted on the training tokens and scored in nats per token on exactly the target tokens that the model is
scored on. The bigram is interpolated modified Kneser-Ney (Chen and Goodman 1999), the strongest smoothing known for
count models. It sees every training token, also those that a short training run never reaches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_PENDING_PAIRS = 1 << 22  # pairs buffered before they are merged: bounds the memory of counting


class BaselineError(ValueError):
    """Tokens that no baseline can be counted or scored on."""

    is_user_error = True


@dataclass(frozen=True)
class NGramCounts:
    """Counts of a token stream.

    Attributes:
        vocab_size: number of token ids V.
        unigrams: [V] int64, how often each token occurs.
        contexts, tokens: [P] int64, the distinct adjacent pairs, sorted by (context, token).
        pairs: [P] int64, how often each pair occurs.
    """

    vocab_size: int
    unigrams: np.ndarray
    contexts: np.ndarray
    tokens: np.ndarray
    pairs: np.ndarray


def count_ngrams(segments: Iterable[np.ndarray], vocab_size: int) -> NGramCounts:
    """Count tokens and adjacent pairs of a stream.

    Args:
        segments: consecutive pieces [n] of one integer token stream; pairs across two pieces count as well.
        vocab_size: number of token ids.

    Raises:
        BaselineError: if the stream is empty or holds an id outside the vocabulary.
    """
    unigrams = np.zeros(vocab_size, dtype=np.int64)
    keys, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    pending: list[np.ndarray] = []
    num_pending, previous = 0, np.empty(0, np.int64)
    for segment in segments:
        ids = _checked_ids(segment, vocab_size)
        if not ids.size:
            continue
        unigrams += np.bincount(ids, minlength=vocab_size)
        joined = np.concatenate((previous, ids))
        previous = ids[-1:]
        pending.append(joined[:-1] * vocab_size + joined[1:])
        num_pending += pending[-1].size
        if num_pending >= _PENDING_PAIRS:
            keys, counts = _merge(keys, counts, pending)
            pending, num_pending = [], 0
    keys, counts = _merge(keys, counts, pending)
    if not keys.size:
        raise BaselineError("fewer than two training tokens: a baseline has nothing to count; give it more text")
    return NGramCounts(vocab_size, unigrams, keys // vocab_size, keys % vocab_size, counts)


class UnigramModel:
    """Token frequencies with add-one smoothing."""

    def __init__(self, counts: NGramCounts) -> None:
        smoothed = counts.unigrams + 1.0
        self._log_probs = np.log(smoothed / smoothed.sum())

    def log_probs(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Natural log of p(target), [n] float64. `contexts` is not looked at."""
        return self._log_probs[targets]


class BigramModel:
    """Interpolated modified Kneser-Ney over adjacent tokens (Chen and Goodman 1999, section 3).

    p(w | v) = (c(v, w) - D(c(v, w))) / c(v) + gamma(v) p_continuation(w), where p_continuation counts the distinct
    contexts of w and is itself interpolated with the uniform distribution, so that every token has a probability.
    """

    def __init__(self, counts: NGramCounts) -> None:
        v = counts.vocab_size
        self._keys = counts.contexts * v + counts.tokens
        self._vocab_size = v
        discounts = _discounts(counts.pairs)[np.minimum(counts.pairs, 3)]
        totals = np.bincount(counts.contexts, weights=counts.pairs, minlength=v)
        removed = np.bincount(counts.contexts, weights=discounts, minlength=v)
        seen = totals > 0
        self._backoff = np.where(seen, removed / np.where(seen, totals, 1.0), 1.0)
        self._discounted = (counts.pairs - discounts) / totals[counts.contexts]
        self._continuation = _continuation(counts.tokens, v)

    def log_probs(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Natural log of p(target | context), [n] float64, for id arrays [n]."""
        keys = np.asarray(contexts, np.int64) * self._vocab_size + np.asarray(targets, np.int64)
        at = np.minimum(np.searchsorted(self._keys, keys), self._keys.size - 1)
        direct = np.where(self._keys[at] == keys, self._discounted[at], 0.0)
        return np.log(direct + self._backoff[contexts] * self._continuation[targets])


def mean_loss(model: UnigramModel | BigramModel, contexts: np.ndarray, targets: np.ndarray) -> float:
    """Mean of -log p over the targets, in nats per token.

    Args:
        model: a baseline.
        contexts: [n] ids of the token before each target.
        targets: [n] ids.
    """
    if not len(targets):
        raise BaselineError("no held-out target tokens to score; give the held-out set more text")
    return float(-model.log_probs(contexts, targets).mean())


def _checked_ids(segment: np.ndarray, vocab_size: int) -> np.ndarray:
    ids = np.asarray(segment, dtype=np.int64)
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise BaselineError(
            f"token ids span {ids.min()}..{ids.max()}, outside the vocabulary of {vocab_size}; "
            "these tokens come from another tokenizer"
        )
    return ids


def _merge(keys: np.ndarray, counts: np.ndarray, pending: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Add buffered pair keys to the sorted (keys, counts)."""
    new_keys, new_counts = np.unique(np.concatenate(pending), return_counts=True) if pending else (keys[:0], counts[:0])
    merged, where = np.unique(np.concatenate((keys, new_keys)), return_inverse=True)
    total = np.bincount(where, weights=np.concatenate((counts, new_counts)), minlength=merged.size)
    return merged, total.astype(np.int64)


def _discounts(pairs: np.ndarray) -> np.ndarray:
    """Discount by min(count, 3): [0, D1, D2, D3+]. Where a count of counts is zero (tiny corpora) the classic 0.75."""
    n1, n2, n3, n4 = (int((pairs == k).sum()) for k in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return np.array([0.0, 0.75, 0.75, 0.75])
    y = n1 / (n1 + 2 * n2)
    estimated = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.clip(
        estimated, [0.0, 0.1, 0.1, 0.1], [0.0, 0.95, 1.9, 2.85]
    )  # keep every kept and every backed-off mass positive


def _continuation(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """[V] share of distinct contexts that each token follows, absolute discount 0.75, the rest spread evenly."""
    contexts = np.bincount(tokens, minlength=vocab_size).astype(np.float64)
    discount = 0.75
    spread = discount * (contexts > 0).sum() / contexts.sum()
    return np.maximum(contexts - discount, 0.0) / contexts.sum() + spread / vocab_size
