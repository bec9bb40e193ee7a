"""What the paper reports of the same tests ("Nested Learning", arXiv 2512.24695), to stand beside what we measure.

Only figures that a source states are here. Where the paper gives a plot and no number, or where we have no source for a number,
the cell is empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

UNKNOWN = ""


class Published(NamedTuple):
    """One test of the paper."""

    text: str
    """What it says, with the number of its table or figure, and what separates our test from it."""
    figures: Mapping[tuple[str, str], str] = {}
    """By (task, subject) of ours, in the paper's unit."""

    def cell(self, task: str, subject: str) -> str:
        """A figure, or an empty cell."""
        return self.figures.get((task, subject), UNKNOWN)


_LANGUAGES = ("parity", "(aa)*", "(abab)*", "a^n b^n", "a^n b^n c^n", "shuffle-2")

PUBLISHED: Mapping[str, Published] = {
    "languages": Published(
        "HOPE solves all six languages at 100 %, in the training length and in the longer bin. Its models are larger and its "
        "training longer than ours.",
        {(language, "hope"): "100 % in both bins" for language in _LANGUAGES},
    ),
    "mad": Published(
        "HOPE leads the attention-free families on the five tasks; sizes and vocabularies are larger there."
    ),
    "needles": Published(
        "HOPE leads the attention-free families on RULER's needles, with models of 760M and 1.3B parameters trained on text. "
        "Ours have some ten thousand parameters and are trained on the needles themselves."
    ),
    "ablations": Published(
        "DGD, momentum, weight decay, CMS and each inner projection are load-bearing (table 6), at 760M parameters on text."
    ),
    "classes": Published(
        "HOPE is compared on CLINC, Banking77 and DBpedia with in-context learning, EWC and InCA, starting from a pretrained "
        "language model; ours are trained from scratch on the classes that are not asked."
    ),
}


def paper_of(suite: str) -> Published | None:
    """What the paper reports of a suite's test; None where it has no such test."""
    return PUBLISHED.get(suite)
