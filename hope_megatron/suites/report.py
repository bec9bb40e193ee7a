"""A suite's table in Markdown and its picture."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from hope_megatron.eval.report import INK, MUTED, markdown_table, save_figure
from hope_megatron.suites.suite import Cell, Results

_COLUMNS = 3  # panels side by side


def spread(results: Results, task: str, subject: str, column: str) -> tuple[float, float, int] | None:
    """Mean, sample standard deviation (0 for one seed) and number of seeds; None before the first seed."""
    found = [
        value
        for seed in range(results.suite.seeds)
        if (value := results.scores.get(Cell(task, subject, seed), {}).get(column)) is not None
    ]
    if not found:
        return None
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found)


def columns(results: Results, task: str) -> list[str]:
    """The names of a task's scores, in the order in which cells have them."""
    names: dict[str, None] = {}
    for cell, scores in results.scores.items():
        if cell.task == task:
            names.update(dict.fromkeys(scores))
    return list(names)


def suite_markdown(results: Results) -> str:
    """Title, what the paper says, a table per task, how it was run."""
    suite = results.suite
    parts = [f"# {suite.title}"]
    if suite.paper:
        parts.append(f"The paper: {suite.paper}")
    parts.append(f"Ours: {suite.quantity}; mean ± standard deviation over seeds. {suite.notes}".rstrip())
    for task in suite.tasks:
        names = columns(results, task)
        rows = [
            [subject, *(_cell(spread(results, task, subject, name)) for name in names)] for subject in suite.subjects
        ]
        parts.append(f"**{task}**\n\n" + markdown_table(["model", *names], rows))
    if suite.parameters:
        parts.append("Parameters: " + ", ".join(f"{name} {count:,}" for name, count in suite.parameters.items()) + ".")
    parts.append("Settings: " + ", ".join(f"{key} {value}" for key, value in suite.settings.items()) + ".")
    return "\n\n".join(parts) + "\n"


def plot_suite(results: Results, path: Path) -> None:
    """A panel per task: a group of bars for each subject, one bar per score, whiskers for the spread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    suite = results.suite
    across = min(_COLUMNS, len(suite.tasks))
    down = math.ceil(len(suite.tasks) / across)
    height = 1.3 + 0.34 * len(suite.subjects)
    figure = Figure(figsize=(4.6 * across, height * down + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False)
    for axes, task in zip(grid.flat, suite.tasks):
        _panel(axes, results, task)
    for axes in list(grid.flat)[len(suite.tasks) :]:
        axes.set_axis_off()
    better = {True: " (higher is better)", False: " (lower is better)", None: ""}[suite.higher_is_better]
    figure.suptitle(f"{suite.title}: {suite.quantity}{better}", color=INK, fontsize=9, x=0.01, ha="left")
    save_figure(figure, path)


def _panel(axes, results: Results, task: str) -> None:
    import matplotlib

    names, subjects = columns(results, task), results.suite.subjects
    thickness = 0.8 / max(1, len(names))
    colours = matplotlib.colormaps["viridis"]
    for i, name in enumerate(names):
        found = [spread(results, task, subject, name) for subject in subjects]
        places = [j + (i - (len(names) - 1) / 2) * thickness for j in range(len(subjects))]
        axes.barh(
            places,
            [x[0] if x else 0.0 for x in found],
            xerr=[x[1] if x else 0.0 for x in found],
            height=thickness * 0.9,
            color=colours(0.15 + 0.7 * i / max(1, len(names) - 1)),
            ecolor=MUTED,
            label=name,
        )
    axes.set_yticks(range(len(subjects)), subjects, fontsize=8)
    axes.invert_yaxis()
    if results.suite.higher_is_better:
        axes.set_xlim(0, 1.02)
    axes.set_title(task, loc="left", fontsize=9, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)
    if len(names) > 1:
        axes.legend(
            fontsize=6, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=min(4, len(names))
        )


def _cell(found: tuple[float, float, int] | None) -> str:
    if found is None:
        return "-"
    mean, deviation, count = found
    return f"{mean:.3f} ± {deviation:.3f}" if count > 1 else f"{mean:.3f}"
