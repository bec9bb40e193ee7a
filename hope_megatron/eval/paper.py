"""Published results of "Nested Learning" (arXiv 2512.24695, table 2), to stand beside what we measure.

Trained on FineWeb-Edu and long documents, vocabulary 32K, length 4K; 760M parameters on 30B tokens, 1.3B on 100B.

Perplexities and averages are the paper's. Accuracies by task are here only where a source states them: LAMBADA's at 760M as one
transcription of the table has it; those of Titans at 1.3B as its own paper gives them (arXiv 2501.00663), with the same
perplexities and the same average. All other cells are empty, and a table says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# The tasks of the average, as lm-evaluation-harness names them, with the metric that is averaged and a short name.
TASKS: dict[str, tuple[str, str]] = {
    "lambada_openai": ("acc", "LMB"),
    "piqa": ("acc", "PIQA"),
    "hellaswag": ("acc_norm", "Hella"),
    "winogrande": ("acc", "Wino"),
    "arc_easy": ("acc", "ARC-e"),
    "arc_challenge": ("acc_norm", "ARC-c"),
    "social_iqa": ("acc", "SIQA"),
    "boolq": ("acc", "BoolQ"),
}
AVERAGED = {task: metric for task, (metric, _) in TASKS.items()}
PAPER_TASKS = ("wikitext", *TASKS)


class Row(NamedTuple):
    """Word perplexity of WikiText, perplexity of LAMBADA, average accuracy of the eight tasks in percent."""

    wiki: float
    lambada: float
    average: float
    accuracies: Mapping[str, float] = {}
    """Percent by task, where a source states it."""


def _lambada(percent: float) -> dict[str, float]:
    return {"lambada_openai": percent}


PAPER: dict[str, dict[str, Row]] = {
    "760M on 30B tokens": {
        "Transformer++": Row(24.18, 24.27, 50.11, _lambada(37.1)),
        "RetNet": Row(25.77, 24.19, 48.19, _lambada(34.5)),
        "DeltaNet": Row(24.52, 24.38, 49.63, _lambada(36.8)),
        "RWKV-7": Row(23.75, 23.08, 50.55, _lambada(37.1)),
        "Comba": Row(22.41, 22.19, 50.89, _lambada(37.5)),
        "TTT": Row(24.17, 23.51, 47.32),
        "Samba": Row(21.07, 22.85, 51.46, _lambada(39.2)),
        "Titans (LMM)": Row(20.08, 21.52, 51.68, _lambada(38.1)),
        "HOPE": Row(18.68, 20.07, 52.28, _lambada(38.8)),
    },
    "1.3B on 100B tokens": {
        "Transformer++": Row(17.92, 17.73, 53.38),
        "RetNet": Row(18.91, 17.04, 52.60),
        "DeltaNet": Row(18.62, 17.10, 51.39),
        "TTT": Row(18.42, 14.51, 55.58),
        "Samba": Row(16.15, 13.21, 54.46),
        "Titans (LMM)": Row(
            15.60, 11.41, 56.82, dict(zip(TASKS, (49.1, 73.1, 56.3, 59.8, 72.4, 40.8, 42.1, 61.0), strict=True))
        ),
        "HOPE": Row(14.39, 10.08, 58.04),
    },
}


def paper_setting(num_parameters: int) -> str:
    """The published setting nearest in size."""
    return "760M on 30B tokens" if num_parameters < 1_000_000_000 else "1.3B on 100B tokens"


def average_accuracy(accuracies: Mapping[str, float]) -> float | None:
    """In percent over the eight tasks; None unless all are there.

    Args:
        accuracies: by task, between 0 and 1.
    """
    if any(task not in accuracies for task in TASKS):
        return None
    return 100 * sum(accuracies[task] for task in TASKS) / len(TASKS)


def paper_table(
    num_parameters: int, wiki: float | None, lambada: float | None, accuracies: Mapping[str, float | None]
) -> str:
    """A Markdown table of every column of the paper: the published rows of the nearest size, and ours; and what separates them.

    Args:
        wiki, lambada: our perplexities; None where not measured.
        accuracies: ours by task, between 0 and 1.
    """
    from hope_megatron.eval.report import markdown_table

    setting = paper_setting(num_parameters)
    rows = [
        [name, f"{row.wiki:.2f}", f"{row.lambada:.2f}", *(_cell(row.accuracies.get(task), 1) for task in TASKS)]
        + [f"{row.average:.2f}"]
        for name, row in PAPER[setting].items()
    ]
    known = {task: share for task, share in accuracies.items() if share is not None}
    ours = [_cell(wiki, 2), _cell(lambada, 2), *(_cell(100 * known[t] if t in known else None, 1) for t in TASKS)]
    rows.append([f"this model, {num_parameters / 1e6:,.1f}M", *ours, _cell(average_accuracy(known), 2)])
    header = [
        f"published: {setting}",
        "Wiki ppl",
        "LMB ppl",
        *(f"{short}, %" for _, short in TASKS.values()),
        "average, %",
    ]
    return (
        f"{markdown_table(header, rows)}\n\nEmpty cells: not measured, or no source for the paper's figure. "
        "Models of other sizes and training tokens than the published ones cannot be compared with them."
    )


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
