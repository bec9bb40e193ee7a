"""Formal languages: after every symbol, which symbols may come next?

The answer at a position is the set of legal next symbols (the end of the string among them), as one class; for parity it
is whether the ones so far are odd. A sequence counts only without a mistake. What makes state tracking possible is a
recurrence whose writes depend on what the memory holds, read at the very token: chunks of one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.splits import by_content, dealt
from hope_megatron.suites.task import Batch, Draw, Source, Split, Task, pad_batch

END = "end"
_HELD_OUT = 0.2  # share of a finite language's trained lengths for validation, and as many for the test
BEGIN = 1  # token before the first symbol; 0 pads
Steps = list[tuple[str, frozenset[str]]]  # each symbol, and what may follow it


@dataclass(frozen=True)
class Language:
    """Strings over an alphabet, drawn by length."""

    alphabet: Sequence[str]
    answers: tuple[frozenset[str], ...]
    """Every set of legal next symbols that occurs."""
    first: frozenset[str]
    """What may begin a string."""
    multiple: int
    """Lengths are multiples of this."""
    string: Callable[[int, np.random.Generator], Steps]
    """A string of a length."""
    one_per_length: bool = False
    """Whether there is a single string of each length."""

    @property
    def vocab_size(self) -> int:
        """Padding, begin, the alphabet, the answers."""
        return 2 + len(self.alphabet) + len(self.answers)

    def lengths(self, bin_name: str) -> list[int]:
        """The lengths of a bin "2-40" that strings have."""
        low, high = (int(text) for text in bin_name.split("-"))
        return [n for n in range(low, high + 1) if n % self.multiple == 0]

    def draw(self, bin_name: str, size: int, rng: np.random.Generator) -> Batch:
        """Strings whose lengths are spread evenly over the bin."""
        return self._batch(rng.choice(self.lengths(bin_name), size), rng)

    def source(self, trained: str) -> Source:
        """Splits by content; where each length has one string, lengths are dealt out, and those held out are asked once each."""
        if not self.one_per_length:
            return by_content(self.draw, (trained,))

        def source(split: Split, seed: int) -> Draw:
            def draw(name: str, size: int, rng: np.random.Generator) -> Batch:
                if name != trained:
                    if split != "test":
                        raise SuiteError(f"strings of {name} symbols are for the test alone; trained are {trained}")
                    return self._batch(self.lengths(name), rng)
                own = dealt(self.lengths(name), split, seed, share=_HELD_OUT, keep_ends=True)
                return self._batch(rng.choice(own, size) if split == "training" else own, rng)

            return draw

        return source

    def _batch(self, lengths: Iterable[int], rng: np.random.Generator) -> Batch:
        return pad_batch([self._encode(self.string(int(length), rng)) for length in lengths])

    def _encode(self, steps: Steps) -> tuple[list[int], list[int]]:
        answer = {legal: 2 + len(self.alphabet) + i for i, legal in enumerate(self.answers)}
        tokens = [BEGIN] + [2 + self.alphabet.index(symbol) for symbol, _ in steps]
        return tokens, [answer[self.first]] + [answer[legal] for _, legal in steps]


def _legal(*symbols: str) -> frozenset[str]:
    return frozenset(symbols)


def _parity(length: int, rng: np.random.Generator) -> Steps:
    bits = rng.integers(0, 2, length)
    odd = np.cumsum(bits) % 2
    return [(str(bit), _legal("odd" if o else "even")) for bit, o in zip(bits, odd)]


def _cycle(word: str) -> Callable[[int, np.random.Generator], Steps]:
    """Repetitions of a word."""

    def string(length: int, rng: np.random.Generator) -> Steps:
        n = len(word)
        following = [*map(_legal, word[1:]), _legal(word[0], END)]
        return [(word[i % n], following[i % n]) for i in range(length)]

    return string


def _blocks(alphabet: str) -> Callable[[int, np.random.Generator], Steps]:
    """Equally many of each letter, one letter after the other."""

    def string(length: int, rng: np.random.Generator) -> Steps:
        n = length // len(alphabet)
        steps: Steps = [("a", _legal("a", "b"))] * n
        for letter, following in zip(alphabet[1:], [*alphabet[2:], END]):
            steps += [(letter, _legal(letter))] * (n - 1) + [(letter, _legal(following))]
        return steps

    return string


def _shuffle2(length: int, rng: np.random.Generator) -> Steps:
    """Two kinds of brackets, each balanced by itself, freely interleaved."""
    depth, steps = [0, 0], []
    for i in range(length):
        remaining, open_now = length - i, sum(depth)
        opens = open_now == 0 or (open_now < remaining and rng.random() < 0.5)
        kind = int(rng.integers(2)) if opens or all(depth) else int(depth[0] == 0)
        depth[kind] += 1 if opens else -1
        legal = {"(", "["} | {")]"[k] for k in range(2) if depth[k]} | ({END} if not any(depth) else set())
        steps.append(("(["[kind] if opens else ")]"[kind], frozenset(legal)))
    return steps


def _shuffle_answers() -> tuple[frozenset[str], ...]:
    return (_legal("(", "[", END), _legal("(", "[", ")"), _legal("(", "[", "]"), _legal("(", "[", ")", "]"))


A, B, C = "a", "b", "c"
LANGUAGES = {
    "parity": Language("01", (_legal("even"), _legal("odd")), _legal("even"), 1, _parity),
    "(aa)*": Language("a", (_legal(A), _legal(A, END)), _legal(A, END), 2, _cycle("aa"), True),
    "(abab)*": Language("ab", (_legal(A), _legal(B), _legal(A, END)), _legal(A, END), 4, _cycle("abab"), True),
    "a^n b^n": Language("ab", (_legal(A), _legal(A, B), _legal(B), _legal(END)), _legal(A), 2, _blocks("ab"), True),
    "a^n b^n c^n": Language(
        "abc", (_legal(A), _legal(A, B), _legal(B), _legal(C), _legal(END)), _legal(A), 3, _blocks("abc"), True
    ),
    "shuffle-2": Language("([)]", _shuffle_answers(), _legal("(", "[", END), 2, _shuffle2),
}


def language_tasks(longest: int) -> list[Task]:
    """Each language, trained on strings of up to `longest` symbols, asked there, up to twice and up to four times as long.

    Without lessons: models that began with short strings learnt them by heart, and then did not count.
    """
    bins = (f"2-{longest}", f"{longest + 1}-{2 * longest}", f"{2 * longest + 1}-{4 * longest}")
    return [Task(name, x.vocab_size, bins, x.source(bins[0]), metric="sequences") for name, x in LANGUAGES.items()]
