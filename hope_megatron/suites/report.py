"""A suite's tables in Markdown, and the same tables as a picture."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hope_megatron.eval.report import INK, markdown_table, save_figure
from hope_megatron.suites.suite import Cell, Results, Suite

_PANELS_ACROSS = 3
_GUESSING = "most frequent answer"
_CHARACTER_INCHES = 0.068  # of the picture's small print


class Spread(NamedTuple):
    """One figure over seeds."""

    mean: float
    deviation: float
    """Sample standard deviation; 0 for one seed."""
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.deviation:.3f}" if self.seeds > 1 else f"{self.mean:.3f}"


class Table(NamedTuple):
    """A task's figures: rows of subjects, columns of scores; None before the first seed."""

    columns: list[str]
    rows: dict[str, list[Spread | None]]


def spread(results: Results, cell: tuple[str, str], column: str) -> Spread | None:
    """A score of (task, subject) over the seeds there are."""
    found = [
        value
        for seed in range(results.suite.seeds)
        if (value := results.scores.get(Cell(*cell, seed), {}).get(column)) is not None
    ]
    if not found:
        return None
    return Spread(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found))


def table(results: Results, task: str) -> Table:
    """A task's figures. Scores named "X after Y" become a matrix: rows of what was learnt last, columns of what is asked."""
    names: dict[str, None] = {}
    for cell, scores in results.scores.items():
        if cell.task == task:
            names.update(dict.fromkeys(scores))
    if not any(" after " in name for name in names):
        rows = {s: [spread(results, (task, s), name) for name in names] for s in results.suite.subjects}
        return Table(list(names), rows)
    pairs = [name.split(" after ") for name in names if " after " in name]
    asked, learnt = (list(dict.fromkeys(part)) for part in zip(*pairs))
    rest = [name for name in names if " after " not in name]
    rows = {}
    for subject in results.suite.subjects:
        for phase in learnt:
            found = [spread(results, (task, subject), f"{name} after {phase}") for name in asked]
            at_end = [spread(results, (task, subject), name) if phase == learnt[-1] else None for name in rest]
            rows[f"{subject}, after {phase}"] = found + at_end
    return Table(asked + rest, rows)


def suite_markdown(results: Results) -> str:
    """Title, what the paper says, a table per task, how it was run."""
    suite = results.suite
    parts = [f"# {suite.title}"]
    if suite.paper:
        parts.append(f"The paper: {suite.paper}")
    parts.append(f"Ours: {suite.quantity}; mean ± standard deviation over seeds. {suite.notes}".rstrip())
    for task in suite.tasks:
        columns, rows = table(results, task)
        cells = [[name, *("-" if x is None else str(x) for x in row)] for name, row in rows.items()]
        parts.append(f"**{task}**\n\n" + markdown_table([suite.subject_kind, *columns], cells))
    if suite.parameters:
        parts.append("Parameters: " + ", ".join(f"{name} {count:,}" for name, count in suite.parameters.items()) + ".")
    parts.append("Settings: " + "; ".join(f"{name} {value}" for name, value in _settings(suite)) + ".")
    return "\n\n".join(parts) + "\n"


def suite_outline(suite: Suite, path: Path | None, others: Sequence[Path] = ()) -> str:
    """What a suite would run, and how much of it the file and other machines' files have.

    Raises:
        SuiteError: if a file is of another suite or of other settings.
    """
    results = Results(suite, path)
    results.load(others)
    cells = list(suite.cells())
    done = sum(cell in results.scores for cell in cells)
    files = [file for file in (path, *others) if file and file.exists()]
    rows = [
        ("tasks", ", ".join(suite.tasks)),
        (suite.subject_kind + "s", ", ".join(suite.subjects)),
        ("seeds", str(suite.seeds)),
        ("parameters", ", ".join(f"{name} {count:,}" for name, count in suite.parameters.items())),
        *_settings(suite),
        ("cells", f"{len(cells)}, of which {done} are in {', '.join(map(str, files))}" if done else str(len(cells))),
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


def plot_suite(results: Results, path: Path) -> None:
    """A panel per task: the table with its cells coloured, the better the brighter; shares from 0 to 1, all else from the column's
    worst to its best. The last row is what always giving the most frequent answer scores, where a suite knows that."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    suite = results.suite
    tables = {task: _with_guessing(table(results, task), task, suite) for task in suite.tasks}
    across = min(_PANELS_ACROSS, len(tables))
    down = math.ceil(len(tables) / across)
    width = sum(_width(t) for t in list(tables.values())[:across])
    height = down * (0.9 + 0.27 * max(len(t.rows) for t in tables.values()))
    title = textwrap.fill(f"{suite.title}: {suite.quantity} (brighter is better)", int(width / _CHARACTER_INCHES / 1.2))
    figure = Figure(figsize=(width, height + 0.25 + 0.2 * title.count("\n")), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False)
    for axes, (task, figures) in zip(grid.flat, tables.items()):
        _panel(axes, task, figures, suite)
    for axes in list(grid.flat)[len(tables) :]:
        axes.set_axis_off()
    figure.suptitle(title, color=INK, fontsize=9, x=0.01, ha="left")
    save_figure(figure, path)


def _with_guessing(figures: Table, task: str, suite: Suite) -> Table:
    """The table with a row for the most frequent answer."""
    scores = [suite.guessing(task, column) for column in figures.columns]
    if all(score is None for score in scores):
        return figures
    row = [None if score is None else Spread(score, 0.0, 1) for score in scores]
    return figures._replace(rows={**figures.rows, _GUESSING: row})


def _width(figures: Table) -> float:
    """Inches of a panel: its row names and its columns."""
    return (
        0.4
        + _CHARACTER_INCHES * max(map(len, figures.rows))
        + sum(max(0.95, 0.08 * len(name)) for name in figures.columns)
    )


def _panel(axes, task: str, figures: Table, suite: Suite) -> None:
    levels = [[math.nan] * len(figures.columns) for _ in figures.rows]  # worst 0 to best 1, for the colours
    for x, column in enumerate(figures.columns):
        means = [found.mean for row in figures.rows.values() if (found := row[x]) is not None]
        worst, best = (min(means), max(means)) if task in suite.unbounded and means else (0.0, 1.0)
        if {task, column} & set(suite.less_is_better):
            worst, best = best, worst
        for y, row in enumerate(figures.rows.values()):
            if (value := row[x]) is not None:
                levels[y][x] = (value.mean - worst) / (best - worst) if best != worst else 0.5
                text = f"{value.mean:.2f}" + (f" ±{value.deviation:.2f}" if value.seeds > 1 else "")
                axes.text(
                    x, y, text, ha="center", va="center", fontsize=7, color=INK if levels[y][x] > 0.5 else "white"
                )
    axes.imshow(levels, aspect="auto", cmap="viridis", vmin=0, vmax=1, alpha=0.85)
    axes.set_xticks(range(len(figures.columns)), figures.columns, fontsize=7)
    axes.set_yticks(range(len(figures.rows)), list(figures.rows), fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(task, loc="left", fontsize=8, color=INK)
