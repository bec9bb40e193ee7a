"""How far back a trained model finds a needle: by length of the haystack, and by depth in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from hope_megatron.model import LanguageModel
from hope_megatron.suites.needle_questions import NEEDLES
from hope_megatron.suites.needle_text import Encode, haystack
from hope_megatron.suites.streamed import streamed_answers

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where in the haystack a needle lies, 0 at its beginning; needles of several parts lie anywhere."""
BY_DEPTH = "number"
"""The kind that is asked at every depth."""


@dataclass(frozen=True)
class Reach:
    """Haystacks of one kind, length and depth."""

    kind: str
    length: int
    depth: float | None
    """None: at random."""
    right: float
    """Share of answers of which every token was the model's first choice."""
    nats_gained: float
    """By the needle, per token of the answer: its loss in the same haystack without needles, minus that with them."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def needle_reach(
    model: LanguageModel,
    encode: Encode,
    filler: np.ndarray,
    lengths: tuple[int, ...],
    *,
    kinds: tuple[str, ...],
    samples: int = 4,
    seed: int = 0,
) -> Iterator[Reach]:
    """Ask at one length after the other; haystacks are streamed, so that length costs time and no memory.

    Args:
        encode: text to token ids.
        filler: tokens that needles hide in.
        lengths: tokens of the haystacks, question and answer included.
        kinds: of `NEEDLES`.
        samples: haystacks of each kind, length and depth; the same questions at every depth.
        seed: draws questions, depths, and where in the filler a haystack begins.
    """
    device = next(model.parameters()).device

    def ask(kind: str, length: int, depth: float | None, *, hide: bool) -> tuple[float, float]:
        rows = []
        for sample in range(samples):
            rng = np.random.default_rng((seed, sample, length))
            rows.append(haystack(NEEDLES[kind](rng), length, filler, encode, rng, hide=hide, depth=depth))
        tokens, targets = (torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*rows))
        answers = streamed_answers(model, tokens, targets)
        return (answers.right == answers.asked).float().mean().item(), (answers.nats / answers.asked).mean().item()

    for length in lengths:
        for kind in kinds:
            _, without = ask(kind, length, None, hide=False)
            for depth in (None, *(DEPTHS if kind == BY_DEPTH else ())):
                right, nats = ask(kind, length, depth, hide=True)
                yield Reach(kind, length, depth, right, without - nats)


def haystack_tokens(lengths: tuple[int, ...], kinds: tuple[str, ...], samples: int) -> int:
    """How many tokens `needle_reach` reads."""
    passes = sum(2 + (len(DEPTHS) if kind == BY_DEPTH else 0) for kind in kinds)
    return passes * samples * sum(lengths)


def asked_lengths(longest: int, shortest: int = 512) -> tuple[int, ...]:
    """Fourfold steps up to the longest, which is always there."""
    found = [longest]
    while found[-1] // 4 >= shortest:
        found.append(found[-1] // 4)
    return tuple(reversed(found))
