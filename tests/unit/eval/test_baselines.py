"""The baselines are probability distributions, counted right, and the bigram is a strong one."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from hope_megatron.eval.baselines import BaselineError, BigramModel, UnigramModel, count_ngrams, mean_loss


def _markov_stream(
    num_tokens: int, vocab_size: int, seed: int, concentration: float = 0.3
) -> tuple[np.ndarray, np.ndarray]:
    """A stream drawn from a known transition matrix, and that matrix."""
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.full(vocab_size, concentration), size=vocab_size)
    cumulative = transition.cumsum(axis=1)
    stream = np.zeros(num_tokens, dtype=np.int64)
    for i, u in enumerate(rng.random(num_tokens - 1)):
        stream[i + 1] = min(np.searchsorted(cumulative[stream[i]], u), vocab_size - 1)
    return stream, transition


def test_counts_equal_a_plain_loop_however_the_stream_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hope_megatron.eval.baselines._PENDING_PAIRS", 50)  # forces several merges
    stream = np.random.default_rng(0).integers(0, 7, size=400)
    counts = count_ngrams(np.split(stream, [1, 3, 3, 100, 399]), vocab_size=9)
    expected = Counter(zip(stream[:-1].tolist(), stream[1:].tolist()))
    assert dict(zip(zip(counts.contexts.tolist(), counts.tokens.tolist()), counts.pairs.tolist())) == expected
    assert counts.unigrams.tolist() == np.bincount(stream, minlength=9).tolist()


@pytest.mark.parametrize("num_tokens", [3, 40, 5000])
def test_both_models_sum_to_one_in_every_context(num_tokens: int) -> None:
    vocab_size = 12  # ids 10 and 11 never occur: unseen contexts and unseen targets
    stream = np.random.default_rng(1).zipf(1.6, size=num_tokens) % 10
    counts = count_ngrams([stream], vocab_size)
    targets = np.arange(vocab_size)
    for model in (UnigramModel(counts), BigramModel(counts)):
        for context in range(vocab_size):
            probabilities = np.exp(model.log_probs(np.full(vocab_size, context), targets))
            assert probabilities.min() > 0
            assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)


def test_bigram_approaches_the_entropy_of_its_source() -> None:
    stream, transition = _markov_stream(60_000, vocab_size=20, seed=2)
    train, heldout = stream[:50_000], stream[50_000:]
    counts = count_ngrams([train], 20)
    contexts, targets = heldout[:-1], heldout[1:]
    entropy = -np.log(transition[contexts, targets]).mean()
    bigram, unigram = (mean_loss(m(counts), contexts, targets) for m in (BigramModel, UnigramModel))
    assert entropy < bigram < entropy + 0.02
    assert unigram > bigram + 0.3


def test_smoothing_beats_add_one_on_sparse_counts() -> None:
    stream, _ = _markov_stream(6_000, vocab_size=150, seed=3, concentration=0.05)
    counts = count_ngrams([stream[:4_000]], 150)
    contexts, targets = stream[4_000:-1], stream[4_001:]
    dense = np.ones((150, 150))
    np.add.at(dense, (stream[:3_999], stream[1:4_000]), 1.0)
    add_one = -np.log((dense / dense.sum(1, keepdims=True))[contexts, targets]).mean()
    assert mean_loss(BigramModel(counts), contexts, targets) < add_one - 0.1


def test_unigram_is_add_one() -> None:
    model = UnigramModel(count_ngrams([np.array([0, 0, 1])], vocab_size=4))
    assert mean_loss(model, np.array([3, 3]), np.array([0, 2])) == pytest.approx(
        -(math.log(3 / 7) + math.log(1 / 7)) / 2
    )


def test_bad_tokens_are_refused_by_value() -> None:
    with pytest.raises(BaselineError, match="another tokenizer"):
        count_ngrams([np.array([0, 5])], vocab_size=5)
    with pytest.raises(BaselineError, match="fewer than two"):
        count_ngrams([np.array([1])], vocab_size=5)
    model = UnigramModel(count_ngrams([np.array([0, 1])], vocab_size=2))
    with pytest.raises(BaselineError, match="no held-out"):
        mean_loss(model, np.array([]), np.array([]))
