"""Every generator against an independent checker: labels, bins, and that the seed alone decides."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from hope_megatron.suites.languages import BEGIN, END, LANGUAGES, language_tasks
from hope_megatron.suites.mad import ASK, BLANK, FIRST, mad_tasks
from hope_megatron.suites.permutations import elements, permutation_tasks
from hope_megatron.suites.recall import SEPARATOR, recall_tasks
from hope_megatron.suites.task import IGNORE, PAD
from hope_megatron.suites.training_data import TrainingData

TASKS = {task.name: task for task in [*language_tasks(20), *permutation_tasks(6), *recall_tasks(8, 4), *mad_tasks(32)]}


def rows(name: str, bin_number: int = 0, size: int = 50):
    """(tokens, targets) of test sequences."""
    task = TASKS[name]
    batch = task.source("test", 0)(task.bins[bin_number], size, np.random.default_rng(bin_number))
    yield from zip(batch.tokens.tolist(), batch.targets.tolist())


@pytest.mark.parametrize("name", TASKS)
def test_the_seed_alone_decides(name):
    task = TASKS[name]
    first, again, other = (TrainingData(task, seed).batch(3, 8) for seed in (1, 1, 2))
    assert np.array_equal(first.tokens, again.tokens) and np.array_equal(first.targets, again.targets)
    if name not in ("(aa)*", "(abab)*", "a^n b^n", "a^n b^n c^n"):  # few strings: seeds may agree
        assert not np.array_equal(first.tokens, other.tokens)


@pytest.mark.parametrize("name", TASKS)
def test_ids_lie_in_the_vocabulary_and_something_is_asked(name):
    task = TASKS[name]
    for bin_name in task.bins:
        batch = task.source("test", 0)(bin_name, 20, np.random.default_rng(0))
        asked = batch.targets[batch.targets != IGNORE]
        assert batch.tokens.shape == batch.targets.shape and batch.tokens.dtype == np.int64
        assert batch.tokens.min() >= 0 and batch.tokens.max() < task.vocab_size
        assert asked.size and asked.min() > 0 and asked.max() < task.vocab_size
        assert (batch.targets != IGNORE).any(1).mean() > 0.9  # short recall sequences may repeat no key


MEMBERS = {
    "(aa)*": lambda s: re.fullmatch("(aa)*", s),
    "(abab)*": lambda s: re.fullmatch("(abab)*", s),
    "a^n b^n": lambda s: len(s) > 0 and s == "a" * (len(s) // 2) + "b" * (len(s) // 2),
    "a^n b^n c^n": lambda s: len(s) > 0 and s == "".join(x * (len(s) // 3) for x in "abc"),
    "shuffle-2": lambda s: _balanced(re.sub(r"[\[\]]", "", s)) and _balanced(re.sub(r"[()]", "", s)),
}


def _balanced(text: str) -> bool:
    while (shorter := re.sub(r"\(\)|\[\]", "", text)) != text:
        text = shorter
    return not text


@pytest.mark.parametrize("name", MEMBERS)
def test_legal_next_symbols_are_those_that_some_member_continues_with(name):
    """Of training strings, against all strings of the language up to a length, by membership alone."""
    language, longest = LANGUAGES[name], 9 if name == "a^n b^n c^n" else 8
    members = {
        word
        for n in range(longest + 1)
        for letters in itertools.product(language.alphabet, repeat=n)
        if MEMBERS[name](word := "".join(letters))
    }
    followed: dict[str, set[str]] = {}
    for word in members:
        for i in range(len(word) + 1):
            followed.setdefault(word[:i], set()).add(word[i] if i < len(word) else END)
    checked = 0
    batch = TrainingData(TASKS[name], 0).batch(0, 400)
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist()):
        word = "".join(language.alphabet[t - 2] for t in tokens[1:] if t != PAD)
        assert MEMBERS[name](word) and tokens[0] == BEGIN
        for i in range(len(word) + 1):
            if len(word) + language.multiple <= longest:  # every continuation is that of a member no longer than this
                legal = language.answers[targets[i] - 2 - len(language.alphabet)]
                assert legal == followed[word[:i]], (word, i)
                checked += 1
        assert language.answers[targets[len(word)] - 2 - len(language.alphabet)] >= {END}
        assert all(t == IGNORE for t in targets[len(word) + 1 :])
    assert checked > 100


def test_parity_counts_the_ones():
    language = LANGUAGES["parity"]
    for tokens, targets in rows("parity", 1):
        bits = [t - 2 for t in tokens[1:] if t != PAD]
        for i in range(len(bits) + 1):
            odd = language.answers[targets[i] - 4] == {"odd"}
            assert odd == (sum(bits[:i]) % 2 == 1)


@pytest.mark.parametrize("name", LANGUAGES)
def test_lengths_lie_in_their_bins(name):
    for number, (low, high) in enumerate([(2, 20), (21, 40), (41, 80)]):
        lengths = {sum(t != PAD for t in tokens) - 1 for tokens, _ in rows(name, number, 200)}
        assert low <= min(lengths) and max(lengths) <= high
        assert all(n % LANGUAGES[name].multiple == 0 for n in lengths) and len(lengths) >= (1 if number == 0 else 5)


@pytest.mark.parametrize("degree", [3, 5])
def test_permutations_are_asked_for_their_product_so_far(degree):
    every, count = elements(degree), len(elements(degree))
    for number in range(3):
        for tokens, targets in rows(f"S{degree}", number, 20):
            things = np.arange(degree)
            assert targets[0] == IGNORE
            for token, target in zip(tokens[1:], targets[1:]):
                if token == PAD:
                    assert target == IGNORE
                    continue
                things = every[token - 2][things]  # where the thing at each place goes next
                assert np.array_equal(every[target - 2 - count], things)


@pytest.mark.parametrize("bin_number, low, high", [(0, 2, 8), (1, 9, 16)])
def test_copying_asks_for_what_was_told(bin_number, low, high):
    for tokens, targets in rows("copying", bin_number):
        n = tokens.index(SEPARATOR)
        assert low <= n <= high
        assert targets[n : 2 * n] == tokens[:n] and set(targets[:n] + targets[2 * n :]) <= {IGNORE}
        assert tokens[n + 1 : 2 * n] == tokens[: n - 1]


@pytest.mark.parametrize("bin_number, pairs", [(0, 4), (1, 8)])
def test_associative_recall_asks_every_key_once(bin_number, pairs):
    for tokens, targets in rows("associative recall", bin_number):
        told = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]))
        asked = {tokens[i]: targets[i] for i in range(len(tokens)) if targets[i] != IGNORE}
        assert len(told) == pairs and asked == told
        assert all(i >= 2 * pairs for i in range(len(tokens)) if targets[i] != IGNORE)


def test_compression_asks_for_every_position():
    for tokens, targets in rows("compression"):
        n = tokens.index(ASK)
        asked = {tokens[i] - FIRST - 16: targets[i] for i in range(n + 1, len(tokens))}
        assert n == 16 and asked == dict(enumerate(tokens[:n]))


def test_in_context_recall_asks_for_what_the_sequence_told():
    for tokens, targets in rows("in-context recall"):
        known: dict[int, int] = {}
        for i in range(0, len(tokens), 2):
            assert targets[i] == known.get(tokens[i], IGNORE) and targets[i + 1] == IGNORE
            assert known.setdefault(tokens[i], tokens[i + 1]) == tokens[i + 1]


def test_fuzzy_recall_reads_back_as_words():
    """Key tokens and value tokens have ranges of their own, so the words can be told apart without the generator."""
    lengths = set()
    for tokens, targets in rows("fuzzy recall"):
        known: dict[tuple, tuple] = {}
        text = "".join("-" if t == BLANK else "k" if t < FIRST + 12 else "v" for t in tokens)
        for match in re.finditer("(k+)(v+)", text):
            key, value = (tuple(tokens[slice(*match.span(group))]) for group in (1, 2))
            first = match.start(2) - 1
            expected = list(value) if key in known else [IGNORE] * len(value)
            assert targets[first : first + len(value)] == expected
            assert known.setdefault(key, value) == value
            lengths |= {len(key), len(value)}
        for a, b in itertools.permutations(known, 2):
            assert b[: len(a)] != a
    assert lengths == {1, 2, 3}


def test_selective_copying_says_what_was_scattered():
    for tokens, targets in rows("selective copying"):
        told, asked = tokens[:32], tokens[32:]
        assert [t for t in told if t != BLANK] == targets[32:] and set(targets[:32]) == {IGNORE}
        assert set(asked) == {ASK} and len(asked) == 4


def test_memorization_has_one_answer_per_fact_and_never_tells_it():
    answers: dict[int, set[int]] = {}
    for tokens, targets in rows("memorization"):
        for i in range(0, len(tokens), 2):
            answers.setdefault(tokens[i], set()).add(targets[i + 1])
            assert tokens[i + 1] == ASK and targets[i] == IGNORE
            assert targets[i + 1] not in tokens
    assert len(answers) > 100 and all(len(values) == 1 for values in answers.values())
