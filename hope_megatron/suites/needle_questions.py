"""What is hidden in text and asked: RULER's needles (arXiv 2404.06654), and facts of bAbI's first tasks (arXiv 1502.05698)."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_NAMES = ("apple", "river", "candle", "garden", "window", "copper", "violin", "marble", "harbor", "meadow", "lantern")
_PEOPLE, _PLACES = ("Mary", "John", "Daniel", "Sandra"), ("kitchen", "garden", "office", "hallway", "bathroom")
_THINGS = ("apple", "football", "milk", "candle")
_SIDES = ("north", "south", "east", "west")


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
    return Question([_special(n, v) for n, v in zip(names, values)], question, f" {values[0]} and {values[1]}")


def multi_value(rng: np.random.Generator) -> Question:
    """One name with two numbers, asked in the order in which they stood."""
    name, values = rng.choice(_NAMES), rng.integers(1_000_000, 10_000_000, 2)
    question = f" What are the special numbers for {name}, in order? They are"
    return Question([_special(name, v) for v in values], question, f" {values[0]} and {values[1]}")


def last_value(rng: np.random.Generator) -> Question:
    """Two names with a number each, both numbers changed once; the later one of one name is asked."""
    names, values = _some(rng, _NAMES, 2), rng.integers(1_000_000, 10_000_000, 4)
    needles = [_special(names[i % 2], value) for i, value in enumerate(values)]
    question = f" What is the special number for {names[0]} now? The special number for {names[0]} is"
    return Question(needles, question, f" {values[2]}")


def one_fact(rng: np.random.Generator) -> Question:
    """bAbI 1. Someone goes from place to place; where are they now?"""
    (who, other), places = _some(rng, _PEOPLE, 2), _some(rng, _PLACES, 3)
    facts = [f" {who} went to the {places[0]}. ", f" {who} moved to the {places[1]}. "]
    _insert(rng, facts, f" {other} went to the {places[2]}. ")
    return Question(facts, f" Where is {who}? {who} is in the", f" {places[1]}")


def two_facts(rng: np.random.Generator) -> Question:
    """bAbI 2. Someone takes a thing and goes somewhere; where is the thing?"""
    (who, other), (thing,), places = _some(rng, _PEOPLE, 2), _some(rng, _THINGS, 1), _some(rng, _PLACES, 2)
    facts = [f" {who} took the {thing}. ", f" {who} went to the {places[0]}. "]
    _insert(rng, facts, f" {other} went to the {places[1]}. ")
    return Question(facts, f" Where is the {thing}? The {thing} is in the", f" {places[0]}")


def three_facts(rng: np.random.Generator) -> Question:
    """bAbI 3. Someone takes a thing through two places; where was it before the second?"""
    (who, other), (thing,), places = _some(rng, _PEOPLE, 2), _some(rng, _THINGS, 1), _some(rng, _PLACES, 3)
    facts = [f" {who} took the {thing}. ", f" {who} went to the {places[0]}. ", f" {who} moved to the {places[1]}. "]
    _insert(rng, facts, f" {other} went to the {places[2]}. ")
    question = f" Where was the {thing} before the {places[1]}? The {thing} was in the"
    return Question(facts, question, f" {places[0]}")


def two_arguments(rng: np.random.Generator) -> Question:
    """bAbI 4. Places on two sides of another; which is on this side?"""
    a, b, c = _some(rng, _PLACES, 3)
    side, other = _some(rng, _SIDES, 2)
    facts = [f" The {a} is {side} of the {b}. "]
    _insert(rng, facts, f" The {c} is {other} of the {b}. ")
    return Question(facts, f" What is {side} of the {b}? {side.capitalize()} of the {b} is the", f" {a}")


def three_arguments(rng: np.random.Generator) -> Question:
    """bAbI 5. Two people give someone a thing; who gave this one?"""
    (giver, taker, other), (thing, second) = _some(rng, _PEOPLE, 3), _some(rng, _THINGS, 2)
    facts = [f" {giver} gave the {thing} to {taker}. "]
    _insert(rng, facts, f" {other} gave the {second} to {taker}. ")
    return Question(facts, f" Who gave the {thing} to {taker}? The {thing} was given by", f" {giver}")


Kind = Callable[[np.random.Generator], Question]
NEEDLES: dict[str, Kind] = {
    "pass-key": pass_key,
    "number": number,
    "uuid": uuid_,
    "multi-key": multi_key,
    "multi-query": multi_query,
    "multi-value": multi_value,
    "last value": last_value,
}
BABI: dict[str, Kind] = {
    "one fact": one_fact,
    "two facts": two_facts,
    "three facts": three_facts,
    "two arguments": two_arguments,
    "three arguments": three_arguments,
}


def _magic(rng: np.random.Generator, count: int, value: Callable[[], str]) -> Question:
    names, values = _some(rng, _NAMES, count), [value() for _ in range(count)]
    asked = int(rng.integers(count))
    question = f" What is the special number for {names[asked]}? The special number for {names[asked]} is"
    return Question([_special(n, v) for n, v in zip(names, values)], question, f" {values[asked]}")


def _special(name: str, value: object) -> str:
    return f" The special number for {name} is {value}. "


def _some(rng: np.random.Generator, of: tuple[str, ...], count: int) -> list[str]:
    """Different ones, in any order."""
    return [str(name) for name in rng.choice(of, count, replace=False)]


def _insert(rng: np.random.Generator, facts: list[str], other: str) -> None:
    """A fact about someone or something else, anywhere among them."""
    facts.insert(int(rng.integers(len(facts) + 1)), other)
