"""What the paper reports of the same tests ("Nested Learning", arXiv 2512.24695), to stand beside what we measure.

Figures are those that transcriptions of the paper state, by its table numbers: table 6 as two of them agree, tables 1 and 4 as one
has them. What the paper gives only as a plot, or no source gives, is not here: the cell stays empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from hope_megatron.eval.paper import PAPER


class Published(NamedTuple):
    """One test of the paper."""

    text: str
    """What it says, with the number of its table or figure, and what scale separates our test from it."""
    figures: Mapping[tuple[str, str], str] = {}
    """By (task, subject) of ours, in the paper's unit."""

    def cell(self, task: str, subject: str) -> str:
        """A figure, or an empty cell."""
        return self.figures.get((task, subject), "")


_LANGUAGES = ("parity", "(aa)*", "(abab)*", "a^n b^n", "a^n b^n c^n", "shuffle-2")
_MAD_TASKS = ("compression", "in-context recall", "fuzzy recall", "selective copying", "memorization")
_MAD = {
    "transformer_pp": ("49.4", "100", "47.9", "96.2", "83.7"),
    "titans": ("49.8", "100", "50.0", "99.4", "83.4"),
    "hope": ("51.2", "100", "52.1", "99.7", "85.2"),
}
# Perplexity and reasoning accuracy of table 6, by our row.
_ABLATIONS = {
    "whole": (12.24, 58.1),
    "w/o DGD": (13.41, 56.5),
    "w/o momentum": (13.58, 56.9),
    "w/o weight decay": (13.71, 57.2),
    "w/o CMS": (13.04, 57.3),
    "w/o adaptive k": (13.77, 56.9),
    "w/o adaptive v": (13.90, 55.1),
    "w/o adaptive q": (12.19, 57.4),
}


def _change(row: str) -> str:
    """Of a row of table 6 against the whole model: more perplexity is worse."""
    perplexity, accuracy = _ABLATIONS[row]
    if row == "whole":
        return f"ppl {perplexity:.2f}, acc {accuracy:.1f}"
    rise = perplexity - _ABLATIONS["whole"][0]
    return f"ppl {perplexity:.2f} ({rise:+.2f}, {'worse' if rise > 0 else 'better'}), acc {accuracy:.1f}"


# Rows of table 2 by our family.
_TABLE_2 = {
    "transformer_pp": "Transformer++", "retnet": "RetNet", "deltanet": "DeltaNet", "ttt_mlp": "TTT", "samba": "Samba",
    "comba": "Comba", "rwkv7": "RWKV-7", "titans": "Titans (LMM)", "hope": "HOPE",
}  # fmt: skip


def _perplexities(row: str) -> str:
    """Of a row of table 2, at both sizes."""
    return "ppl " + ", ".join(f"{rows[row].wiki:.2f}" for rows in PAPER.values() if row in rows)


PUBLISHED: Mapping[str, Published] = {
    "languages": Published(
        "table 5: HOPE solves all languages at 100 %, at the training length and in the longer bin; a Transformer has 0 % of "
        "parity in the longer bin. Our models have some thirty thousand parameters and some hundred steps.",
        {(language, "hope"): "100 %, longer bin 100 %" for language in _LANGUAGES}
        | {("parity", "transformer_pp"): "longer bin 0 %"},
    ),
    "mad": Published(
        "table 4, accuracy in percent. Sequences, vocabularies and models are larger there, and compression is asked through a "
        "decoder of its own.",
        {
            (task, family): f"{value} %"
            for family, values in _MAD.items()
            for task, value in zip(_MAD_TASKS, values, strict=True)
        },
    ),
    "needles": Published(
        "table 1, percent at 4K / 8K / 16K tokens, RULER's needles. Its models have 760M and 1.3B parameters and are trained on "
        "text; ours that are trained here have some ten thousand parameters and are trained on the needles themselves.",
        {
            (
                "answers right",
                "pass-key",
            ): "HOPE 100 / 100 / 100, Titans 100 / 100 / 100, Transformer 88.6 / 76.4 / 79.8",
            (
                "answers right",
                "uuid",
            ): "HOPE 73.2 / 46.2 / 24.8, Titans 74.2 / 42.8 / 21.2, Transformer 78.0 / 69.2 / 40.8",
            ("answers right", "multi-key"): "at 16K: HOPE 14.8, Transformer 61.4",
            ("single", "hope"): "pass-key 100 / 100 / 100, uuid 73.2 / 46.2 / 24.8",
            ("single", "titans"): "pass-key 100 / 100 / 100, uuid 74.2 / 42.8 / 21.2",
            ("single", "transformer_pp"): "pass-key 88.6 / 76.4 / 79.8, uuid 78.0 / 69.2 / 40.8",
            ("multi-key", "hope"): "at 16K: 14.8",
            ("multi-key", "transformer_pp"): "at 16K: 61.4",
        },
    ),
    "ablations": Published(
        "table 6: perplexity on text and accuracy of reasoning tasks, 760M parameters. Taking out the query's memory makes "
        "perplexity better there. Ours have about a hundred thousand parameters.",
        {("text", row): _change(row) for row in _ABLATIONS},
    ),
    "classes": Published(
        "figure 6, a plot: HOPE is above in-context learning, EWC and InCA on CLINC, Banking77 and DBpedia. It starts from "
        "pretrained Llama models; ours are trained from scratch on the classes that are not asked."
    ),
    "domains": Published(
        "no such test; figure 8, a plot, shows two languages learnt one after the other by pretrained models."
    ),
    "families": Published(
        "table 2: word perplexity of WikiText at 760M parameters on 30B tokens, and at 1.3B on 100B. Ours have about a hundred "
        "thousand parameters and some million bytes of Python.",
        {("text", family): _perplexities(row) for family, row in _TABLE_2.items()},
    ),
    "permutations": Published("no such test."),
    "consolidation": Published("no such test: it names offline consolidation as open."),
    "recall": Published("no such test; table 3 has recall on text, in-context recall of MAD is table 4."),
}


def paper_of(suite: str) -> Published | None:
    """What the paper reports of a suite's test; None where nothing is known."""
    return PUBLISHED.get(suite)
