"""Published results of "Nested Learning" (arXiv 2512.24695), to stand beside what we measure.

Trained on FineWeb-Edu and long documents, vocabulary 32K, length 4K; 760M parameters on 30B tokens, 1.3B on 100B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Row(NamedTuple):
    """Word perplexity of WikiText, perplexity of LAMBADA, average accuracy of the eight tasks in percent."""

    wiki: float
    lambada: float
    average: float


PAPER: dict[str, dict[str, Row]] = {
    "760M on 30B tokens": {
        "Transformer++": Row(24.18, 24.27, 50.11),
        "RetNet": Row(25.77, 24.19, 48.19),
        "DeltaNet": Row(24.52, 24.38, 49.63),
        "TTT": Row(24.17, 23.51, 47.32),
        "Samba": Row(21.07, 22.85, 51.46),
        "Titans (LMM)": Row(20.08, 21.52, 51.68),
        "HOPE": Row(18.68, 20.07, 52.28),
    },
    "1.3B on 100B tokens": {
        "Transformer++": Row(17.92, 17.73, 53.38),
        "RetNet": Row(18.91, 17.04, 52.60),
        "DeltaNet": Row(18.62, 17.10, 51.39),
        "TTT": Row(18.42, 14.51, 55.58),
        "Samba": Row(16.15, 13.21, 54.46),
        "Titans (LMM)": Row(15.60, 11.41, 56.82),
        "HOPE": Row(14.39, 10.08, 58.04),
    },
}

# The tasks of the average, as lm-evaluation-harness names them, and the metric that is averaged.
AVERAGED = {
    "lambada_openai": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "social_iqa": "acc",
    "boolq": "acc",
}
PAPER_TASKS = ("wikitext", *AVERAGED)


def paper_setting(num_parameters: int) -> str:
    """The published setting nearest in size."""
    return "760M on 30B tokens" if num_parameters < 1_000_000_000 else "1.3B on 100B tokens"


def average_accuracy(accuracies: Mapping[str, float]) -> float | None:
    """In percent over the eight tasks; None unless all are there.

    Args:
        accuracies: by task, between 0 and 1.
    """
    if any(task not in accuracies for task in AVERAGED):
        return None
    return 100 * sum(accuracies[task] for task in AVERAGED) / len(AVERAGED)


def paper_table(num_parameters: int, wiki: float | None, lambada: float | None, average: float | None) -> str:
    """A Markdown table: the published rows of the nearest size, and ours ("-": not measured)."""
    from hope_megatron.eval.report import markdown_table

    setting = paper_setting(num_parameters)
    rows = [[name, *(f"{value:.2f}" for value in row)] for name, row in PAPER[setting].items()]
    ours = [None if value is None else f"{value:.2f}" for value in (wiki, lambada, average)]
    rows.append([f"this model, {num_parameters / 1e6:,.1f}M", *ours])  # type: ignore[list-item]
    return markdown_table([f"published: {setting}", "Wiki ppl", "LAMBADA ppl", "average accuracy, %"], rows)
