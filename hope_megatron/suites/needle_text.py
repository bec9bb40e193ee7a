"""Needles in text for a trained run: the haystack is streamed, so that its length costs time but no memory.

An answer is right if every one of its tokens is the model's first choice, which is what greedy decoding would say. Models too
small for that still show whether they remember at all: nats by which the needle makes the answer's tokens likelier than
the same haystack without it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from hope_megatron.model import LanguageModel
from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.streamed import streamed_answers
from hope_megatron.suites.suite import Cell, Scores, Suite, SuiteOptions, chosen
from hope_megatron.suites.task import IGNORE, Batch

Encode = Callable[[str], np.ndarray]
DEFAULT_LENGTHS = (1024, 4096, 16384, 65536)
SAMPLES = 4  # haystacks of a length and seed
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_NAMES = ("apple", "river", "candle", "garden", "window", "copper", "violin", "marble", "harbor", "meadow", "lantern")
_PEOPLE, _PLACES = ("Mary", "John", "Daniel", "Sandra"), ("kitchen", "garden", "office", "hallway", "bathroom")


class Question(NamedTuple):
    """Sentences to hide, in the order in which they stand, and what is asked of them."""

    needles: list[str]
    question: str
    answer: str


def pass_key(rng: np.random.Generator) -> Question:
    """A number that the text says to remember."""
    key = str(rng.integers(10_000, 100_000))
    needle = f" The pass key is {key}. Remember it. {key} is the pass key. "
    return Question([needle], " What is the pass key? The pass key is", f" {key}")


def number(rng: np.random.Generator) -> Question:
    """A seven-digit number of one name."""
    return _magic(rng, 1, lambda: str(rng.integers(1_000_000, 10_000_000)))


def uuid_(rng: np.random.Generator) -> Question:
    """The same with a UUID."""
    return _magic(rng, 1, lambda: str(uuid.UUID(bytes=rng.bytes(16), version=4)))


def multi_key(rng: np.random.Generator) -> Question:
    """Four names with a number each; one is asked."""
    return _magic(rng, 4, lambda: str(rng.integers(1_000_000, 10_000_000)))


def multi_query(rng: np.random.Generator) -> Question:
    """Two names with a number each; both are asked."""
    names, values = rng.choice(_NAMES, 2, replace=False), rng.integers(1_000_000, 10_000_000, 2)
    question = f" What are the special numbers for {names[0]} and {names[1]}? They are"
    return Question([_fact(n, v) for n, v in zip(names, values)], question, f" {values[0]} and {values[1]}")


def multi_value(rng: np.random.Generator) -> Question:
    """One name with two numbers, asked in the order in which they stood."""
    name, values = rng.choice(_NAMES), rng.integers(1_000_000, 10_000_000, 2)
    question = f" What are the special numbers for {name}, in order? They are"
    return Question([_fact(name, v) for v in values], question, f" {values[0]} and {values[1]}")


def last_place(rng: np.random.Generator) -> Question:
    """Someone goes from place to place; where are they now? (In the manner of bAbI's first task.)"""
    person, places = rng.choice(_PEOPLE), rng.choice(_PLACES, 3, replace=False)
    other = rng.choice([p for p in _PEOPLE if p != person])
    moves = ((person, "went", places[0]), (person, "moved", places[1]), (other, "went", places[2]))
    facts = [f" {who} {verb} to the {place}. " for who, verb, place in moves]
    return Question(facts, f" Where is {person}? {person} is in the", f" {places[1]}")


KINDS: dict[str, Callable[[np.random.Generator], Question]] = {
    "pass-key": pass_key,
    "number": number,
    "uuid": uuid_,
    "multi-key": multi_key,
    "multi-query": multi_query,
    "multi-value": multi_value,
    "last place": last_place,
}


def _magic(rng: np.random.Generator, count: int, value: Callable[[], str]) -> Question:
    names, values = rng.choice(_NAMES, count, replace=False), [value() for _ in range(count)]
    asked = int(rng.integers(count))
    question = f" What is the special number for {names[asked]}? The special number for {names[asked]} is"
    return Question([_fact(n, v) for n, v in zip(names, values)], question, f" {values[asked]}")


def _fact(name: str, value: object) -> str:
    return f" The special number for {name} is {value}. "


def haystack(question: Question, length: int, encode: Encode, rng: np.random.Generator, *, hide: bool = True) -> Batch:
    """One sequence of exactly `length` tokens: filler with the needles at random depths, the question, the answer.

    hide: False leaves the needles out, filler in their place.

    Raises:
        SuiteError: if the length has no room for filler.
    """
    needles = [encode(text) for text in question.needles] if hide else []
    asked, answer = encode(question.question), encode(question.answer)
    room = length + 1 - len(asked) - len(answer) - sum(map(len, needles))
    if room < 1:
        raise SuiteError(f"needles and question need {length + 1 - room} tokens; a length of {length} is too short")
    noise = encode(_NOISE)
    filler = np.tile(noise, room // len(noise) + 1)[:room]
    depths = np.sort(rng.integers(0, room + 1, len(question.needles)))
    pieces, last = [], 0
    for depth, needle in zip(depths, needles):
        pieces += [filler[last:depth], needle]
        last = depth
    stream = np.concatenate([*pieces, filler[last:], asked, answer])
    targets = np.full(length, IGNORE)
    targets[-len(answer) :] = answer
    return Batch(stream[None, :-1].astype(np.int64), targets[None])


def build(
    model: LanguageModel, encode: Encode, name: str, title: str, trained_tokens: int, options: SuiteOptions
) -> Suite:
    """Needles of every kind and length for one model.

    Args:
        encode: text to token ids.
        name, title: where the model is, and what to call it.
        trained_tokens: sequence length in training.
        options: `tasks` chooses kinds of needles.
    """
    lengths = options.lengths or ((256, 512) if options.quick else DEFAULT_LENGTHS)
    device = next(model.parameters()).device

    @cache
    def ask(kind: str, length: int, seed: int, hide: bool) -> tuple[float, float]:
        """Share of right answers and nats per answer token. The same questions and depths with and without needles."""
        rows = []
        for sample in range(SAMPLES):
            rng = np.random.default_rng((seed, sample, length))
            rows.append(haystack(KINDS[kind](rng), length, encode, rng, hide=hide))
        tokens, targets = (torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*rows))
        answers = streamed_answers(model, tokens, targets)
        return (answers.right == answers.asked).float().mean().item(), (answers.nats / answers.asked).mean().item()

    def run(cell: Cell) -> Scores:
        scores = {}
        for length in lengths:
            right, nats = ask(cell.subject, length, cell.seed, True)
            gained = cell.task == "nats gained"
            scores[f"{length:,}"] = ask(cell.subject, length, cell.seed, False)[1] - nats if gained else right
        return scores

    return Suite(
        name="needles",
        title=f"Needles in a haystack: {title}",
        tasks=("answers right", "nats gained"),
        subjects=chosen("kind of needle", options.tasks, tuple(KINDS)),
        seeds=options.seeds,
        settings={"model": name, "trained_tokens": trained_tokens, "lengths": list(lengths), "samples": SAMPLES},
        run=run,
        quantity="share of answers right to the last token, and nats per answer token gained by the needle, by length in tokens",
        higher_is_better=None,
        subject_kind="needle",
        paper="HOPE leads the attention-free families on RULER's needles.",
        notes=f"{SAMPLES} haystacks per seed, streamed in pieces; trained on {trained_tokens:,} tokens.",
    )
