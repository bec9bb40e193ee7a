"""Results for people and for programs: JSON, Markdown tables and PNG charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hope_megatron.runtime.files import replacing

INK, MUTED, ACCENT = "#1f2328", "#8c959f", "#0969da"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, columns aligned so that it reads in a terminal too. Floats have four decimals."""
    cells = [list(header)] + [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of scores by model (see `HeldoutScore.as_dict`)."""
    figures = ("loss", "perplexity", "bits_per_byte", "word_perplexity", "byte_perplexity")
    rows = [[name, *(score[figure] for figure in figures)] for name, score in scores.items()]
    return markdown_table(
        ["model", "nats per token", "perplexity", "bits per byte", "word perplexity", "byte perplexity"], rows
    )


def plot_losses(path: Path, losses: Mapping[str, float], title: str) -> None:
    """A bar for each model's held-out loss, in nats per token; the last one is ours and stands out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 1.2 + 0.45 * len(losses)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names, values = list(losses), list(losses.values())
    colours = [MUTED] * (len(names) - 1) + [ACCENT]
    axes.barh(names, values, color=colours, height=0.62)
    for position, value in enumerate(values):
        axes.text(value, position, f" {value:.3f}", va="center", ha="left", color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.15)
    axes.set_xlabel("held-out loss, nats per token (lower is better)")
    axes.set_title(title, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    save_figure(figure, path)


def plot_positions(path: Path, positions: Sequence[Mapping[str, Any]], trained_tokens: int, title: str) -> None:
    """Mean loss by position in the context (see `loss_by_position`), the trained length marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    edges = [row["to"] for row in positions]
    axes.plot(edges, [row["loss"] for row in positions], color=ACCENT, marker="o", linewidth=2)
    for row in positions:
        axes.annotate(
            f"{row['loss']:.2f}", (row["to"], row["loss"]), xytext=(0, 6), textcoords="offset points", ha="center"
        )
    axes.axvline(trained_tokens, color=MUTED, linestyle=":")
    axes.annotate(
        "trained length", (trained_tokens, 1), xycoords=("data", "axes fraction"), xytext=(-3, -3), color=MUTED,
        textcoords="offset points", va="top", ha="right", rotation=90, fontsize=9,
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(edges, [f"{edge:,}" for edge in edges])
    axes.margins(y=0.2)
    axes.set_xlabel("up to this position in the context (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    save_figure(figure, path)


def plot_tasks(path: Path, figures: Sequence[tuple[str, str, Mapping[str, Any]]], title: str) -> None:
    """Bars of task metrics with their standard errors: shares on the left, perplexities and the like on the right.

    Args:
        figures: (task, metric, {"value", "stderr"}).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = [row for row in figures if row[1].startswith(("acc", "exact_match", "f1", "mcc"))]
    others = [row for row in figures if row not in shares]
    panels = [(rows, label) for rows, label in ((shares, "share right"), (others, "perplexity, loss")) if rows]
    height = 1.4 + 0.36 * max((len(rows) for rows, _ in panels), default=1)
    figure = Figure(figsize=(6.4 * max(1, len(panels)), height), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (rows, label) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        values = [row[2]["value"] for row in rows]
        errors = [row[2]["stderr"] or 0.0 for row in rows]
        axes.barh([f"{task}  {metric}" for task, metric, _ in rows], values, xerr=errors, color=ACCENT, height=0.62)
        for position, (value, error) in enumerate(zip(values, errors)):
            axes.text(value + error, position, f" {value:,.3f}", va="center", ha="left", color=INK, fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path, dpi: int = 150) -> None:
    """Write a matplotlib figure as a PNG, through a temporary file."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"
    return str(value)
