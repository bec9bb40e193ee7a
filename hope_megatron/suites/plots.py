"""A suite as pictures: its tables, and how the next longer bin went over the steps of training."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

from hope_megatron.eval.report import INK, MUTED, save_figure
from hope_megatron.suites.report import Spread, Table, table
from hope_megatron.suites.results import Results
from hope_megatron.suites.suite import Cell, Suite

_PANELS_ACROSS = 3
_CHANCE = "most frequent answer"
_CHARACTER_INCHES = 0.068  # of the picture's small print


def plot_suite(results: Results, path: Path) -> None:
    """A panel per task: the table of one setting per subject, its cells coloured, the better the brighter; shares from 0 to 1, all
    else from the column's worst to its best. The last row is the chance level, where the suite knows one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    suite = results.suite
    tables = {task: _with_chance(table(results, task), task, suite) for task in suite.tasks}
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


def _with_chance(figures: Table, task: str, suite: Suite) -> Table:
    scores = [suite.guessing(task, column) for column in figures.columns]
    if all(score is None for score in scores):
        return figures
    row = [None if score is None else Spread(score, score, score, score, score, 1) for score in scores]
    return Table(figures.columns, {**figures.rows, _CHANCE: row})


def _width(figures: Table) -> float:
    """Inches of a panel: its row names and its columns."""
    return (
        0.4
        + _CHARACTER_INCHES * max(map(len, figures.rows))
        + sum(max(1.15, 0.08 * len(name)) for name in figures.columns)
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
                text = f"{value.mean:.2f}" + (f" (worst {value.worst:.2f})" if value.seeds > 1 else "")
                axes.text(
                    x, y, text, ha="center", va="center", fontsize=7, color=INK if levels[y][x] > 0.5 else "white"
                )
    axes.imshow(levels, aspect="auto", cmap="viridis", vmin=0, vmax=1, alpha=0.85)
    axes.set_xticks(range(len(figures.columns)), figures.columns, fontsize=7)
    axes.set_yticks(range(len(figures.rows)), list(figures.rows), fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(task, loc="left", fontsize=8, color=INK)


def plot_trajectories(results: Results, path: Path) -> bool:
    """A row per task and a column per subject, or tasks beside each other for a single subject: the score of the next longer
    bin over the steps, a line per seed, on the chosen weights.

    Read from snapshots after each training, so that it decided nothing.

    Returns:
        False, and no picture, if no cell has such a score.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    suite = results.suite
    shown = [
        task for task in suite.tasks if any(cell.task == task and o.trajectory for cell, o in results.outcomes.items())
    ]
    if not shown:
        return False
    alone = len(suite.subjects) == 1  # then tasks stand beside each other, as in the tables' picture
    across = min(_PANELS_ACROSS, len(shown)) if alone else len(suite.subjects)
    down = math.ceil(len(shown) / across) if alone else len(shown)
    title = f"{suite.title}: next longer bin over training steps, a line per seed"
    width = 1.2 + 1.5 * across
    title = textwrap.fill(title, int(width / _CHARACTER_INCHES / 1.2))
    figure = Figure(figsize=(width, 0.8 + 1.1 * down + 0.2 * title.count("\n")), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for i, (task, subject) in enumerate((task, subject) for task in shown for subject in suite.subjects):
        axes = grid[i // across][i % across]
        _lines(axes, results, task, subject)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=6)
        if alone or i < across:
            axes.set_title(task if alone else subject, fontsize=7)
        if i % across == 0 and not alone:
            axes.set_ylabel(task, fontsize=7)
    for axes in list(grid.flat)[len(shown) * len(suite.subjects) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=9, color=INK, x=0.01, ha="left")
    save_figure(figure, path)
    return True


def _lines(axes, results: Results, task: str, subject: str) -> None:
    if (choice := results.choice(subject)) is None:
        return
    for seed in range(results.suite.seeds):
        outcome = results.outcomes.get(Cell(task, subject, seed, choice.setting))
        lines = outcome.trajectory.get(choice.weights, {}) if outcome else {}
        for values in (v for name, v in lines.items() if name != "steps"):
            axes.plot(lines["steps"], values, color=INK if seed == 0 else MUTED, linewidth=0.8, alpha=0.8)
    axes.set_ylim(-0.03, 1.03)
