"""A suite's tables in Markdown: figures over seeds, with what was chosen and by how many tries, beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hope_megatron.eval.report import markdown_table
from hope_megatron.suites.models import LIKE
from hope_megatron.suites.paper import paper_of
from hope_megatron.suites.results import Results
from hope_megatron.suites.selection import Choice
from hope_megatron.suites.suite import Cell, Suite

SOLVED = 0.99
SOLVING_SEEDS = 5  # a claim of fewer is none
_RESAMPLES = 10_000
_FIGURE = "mean [95 % bootstrap interval of the mean], median, worst over seeds, on test data"
_RULE = (
    "Chosen on validation data at the trained lengths, over all tasks, among {tries} candidates for each row alike. "
    "It solves a task if the worst of at least five seeds is 0.99 or more in every bin."
)
_BEST = "Chosen in the same way among the same candidates, but for each task by itself."


class Spread(NamedTuple):
    """One figure over seeds."""

    mean: float
    low: float
    """95 % bootstrap interval of the mean: from here"""
    high: float
    """to here."""
    median: float
    worst: float
    seeds: int

    def __str__(self) -> str:
        if self.seeds == 1:
            return f"{self.mean:.3f} (one seed)"
        return f"{self.mean:.3f} [{self.low:.2f}, {self.high:.2f}], {self.median:.2f}, {self.worst:.2f}"


class Table(NamedTuple):
    """A task's figures: rows of subjects, columns of scores; None before the first seed."""

    columns: list[str]
    rows: dict[str, list[Spread | None]]


def summarise(values: Sequence[float], *, less_is_better: bool = False) -> Spread:
    """Mean, interval, median and worst of figures over seeds. The interval is by percentile over 10,000 resamples."""
    found = np.asarray(values, float)
    means = np.random.default_rng(0).choice(found, (_RESAMPLES, len(found))).mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    worst = found.max() if less_is_better else found.min()
    return Spread(found.mean().item(), float(low), float(high), float(np.median(found)), worst.item(), len(found))


def scores_of(results: Results, cell: tuple[str, str], choice: Choice) -> dict[int, Mapping[str, float]]:
    """Test scores of (task, subject) by seed, with the setting and weights of a choice."""
    found: dict[int, Mapping[str, float]] = {}
    for seed in range(results.suite.seeds):
        outcome = results.outcomes.get(Cell(*cell, seed, choice.setting))
        if outcome is not None and choice.weights in outcome.scores:
            found[seed] = outcome.scores[choice.weights]
    return found


def table(results: Results, task: str, *, best: bool = False) -> Table:
    """A task's test figures. Scores named "X after Y" become a matrix: rows of what was learnt last, columns of what is asked.

    Args:
        best: of each subject's setting for this task alone; else of its one setting for all tasks.
    """
    suite = results.suite
    by_subject: dict[str, dict[int, Mapping[str, float]]] = {}
    for subject in suite.subjects:
        choice = results.choice(subject, task if best else None)
        by_subject[subject] = scores_of(results, (task, subject), choice) if choice else {}
    names = list(dict.fromkeys(name for seeds in by_subject.values() for found in seeds.values() for name in found))

    def spread(subject: str, name: str) -> Spread | None:
        values = [found[name] for found in by_subject[subject].values() if name in found]
        if not values:
            return None
        return summarise(values, less_is_better=bool({task, name} & set(suite.less_is_better)))

    if not any(" after " in name for name in names):
        return Table(names, {s: [spread(s, name) for name in names] for s in suite.subjects})
    pairs = [name.split(" after ") for name in names if " after " in name]
    asked, learnt = (list(dict.fromkeys(part)) for part in zip(*pairs))
    rest = [name for name in names if " after " not in name]
    rows = {}
    for subject in suite.subjects:
        for phase in learnt:
            found = [spread(subject, f"{name} after {phase}") for name in asked]
            at_end = [spread(subject, name) if phase == learnt[-1] else None for name in rest]
            rows[f"{subject}, after {phase}"] = found + at_end
    return Table(asked + rest, rows)


def solved(row: Sequence[Spread | None]) -> str:
    """Whether every bin is solved: "yes", "no", or "-" with too few seeds to say."""
    if any(found is None or found.seeds < SOLVING_SEEDS for found in row):
        return "-"
    return "yes" if all(found is not None and found.worst >= SOLVED for found in row) else "no"


def suite_markdown(results: Results) -> str:
    """Title, what the paper says, the tables with one setting per subject and then with the best per task, how it was run."""
    suite = results.suite
    parts = [f"# {suite.title}"]
    if published := paper_of(suite.name):
        parts.append(f"The paper: {published.text}")
    parts.append(f"Ours: {suite.quantity}. Each figure: {_FIGURE}. {suite.notes}".rstrip())
    if suite.grid:
        parts.append("## One setting per " + suite.subject_kind + f"\n\n{_RULE.format(tries=suite.num_tries)}")
    parts += [_task_section(results, task, best=False) for task in suite.tasks]
    if suite.grid and len(suite.tasks) > 1:
        parts.append(f"## The best setting for each task\n\n{_BEST}")
        parts += [_task_section(results, task, best=True) for task in suite.tasks]
    if like := [LIKE[name] for name in dict.fromkeys(s.split(":")[0] for s in suite.subjects) if name in LIKE]:
        parts.append("Not the whole of their papers' models: " + "; ".join(like) + ".")
    if suite.parameters:
        parts.append("Parameters: " + ", ".join(f"{name} {count:,}" for name, count in suite.parameters.items()) + ".")
    parts.append("Settings: " + "; ".join(f"{name} {value}" for name, value in _settings(suite)) + ".")
    return "\n\n".join(parts) + "\n"


def _task_section(results: Results, task: str, *, best: bool) -> str:
    suite = results.suite
    columns, rows = table(results, task, best=best)
    published = paper_of(suite.name)
    cells = []
    for name, row in rows.items():
        subject = name.split(", after ")[0]
        choice = results.choice(subject, task if best else None)
        line = [name, *("-" if x is None else str(x) for x in row)]
        if suite.grid:
            line += [str(choice) if choice else "tries are missing", str(suite.num_tries)]
        if task not in suite.unbounded:
            line.append(solved(row))
        if published and published.figures:
            line.append(published.cell(task, subject))
        cells.append(line)
    header = [suite.subject_kind, *columns]
    header += ["setting", "tries"] if suite.grid else []
    header += ["solves"] if task not in suite.unbounded else []
    header += ["the paper"] if published and published.figures else []
    return f"**{task}**\n\n" + markdown_table(header, cells)


def suite_outline(suite: Suite, path: Path | None, others: Sequence[Path] = ()) -> str:
    """What a suite would run, and how much of it the file and other machines' files have.

    Raises:
        SuiteError: if a file is of another suite or of other settings.
    """
    results = Results(suite, path)
    results.load(others)
    planned = [*results.planned()]
    total = len(planned) + len(results.to_follow())
    done = sum(cell in results.outcomes for cell in planned)
    files = [file for file in (path, *others) if file and file.exists()]
    tried = suite.grid and sum(len(suite.tries(subject)) for subject in suite.subjects)
    rows = [
        ("tasks", ", ".join(suite.tasks)),
        (suite.subject_kind + "s", ", ".join(suite.subjects)),
        ("seeds", str(suite.seeds)),
        ("tries", f"{suite.num_tries} candidates per {suite.subject_kind}, {tried} trainings" if tried else ""),
        ("parameters", ", ".join(f"{name} {count:,}" for name, count in suite.parameters.items())),
        *_settings(suite),
        ("cells", f"{total}, of which {done} are in {', '.join(map(str, files))}" if done else str(total)),
    ]
    return f"{suite.title}\n" + "\n".join(f"  {name:<20} {value}" for name, value in rows if value)


def _settings(suite: Suite) -> list[tuple[str, str]]:
    """Names and values in words; what is the same for all tasks is said once, what is of other tasks not at all."""

    def said(value: Any) -> str:
        if isinstance(value, Mapping):
            ours = [key for key in value if key in suite.tasks] or value
            texts = {key: said(value[key]) for key in ours}
            return " and ".join({*texts.values()} if len({*texts.values()}) == 1 else map(": ".join, texts.items()))
        return ", ".join(map(said, value)) if isinstance(value, (list, tuple)) else str(value)

    return [(key.replace("_", " "), text) for key, value in suite.settings.items() if (text := said(value))]
