"""A model far beyond its trained length, as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hope_megatron.eval.report import ACCENT, INK, MUTED, save_figure


def plot_length(
    path: Path,
    stretches: Sequence[Mapping[str, Any]],
    needles: Sequence[Mapping[str, Any]],
    trained_tokens: int,
    title: str,
) -> None:
    """Loss, time and drift by position; below them needles by kind, and by depth, where there are any.

    Args:
        stretches: see `Stretch.as_dict`.
        needles: see `Reach.as_dict`.
        trained_tokens: sequence length in training, marked.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = 2 if needles else 1
    figure = Figure(figsize=(12.5, 0.5 + 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, 3, squeeze=False)
    stops = [row["stop"] for row in stretches]
    loss, speed, drift = panels[0]
    loss.plot(stops, [row["loss"] for row in stretches], color=ACCENT, marker="o")
    loss.set_ylabel("nats per token")
    speed.plot(stops, [1e3 * row["seconds_per_token"] for row in stretches], color=ACCENT, marker="o")
    speed.set_ylabel("ms per token")
    speed.set_ylim(bottom=0)
    for name in stretches[-1]["drift"]:
        memory = name.split()[-1]
        colour = f"C{sorted({key.split()[-1] for key in stretches[-1]['drift']}).index(memory)}"
        first = name.startswith("layer 1 ")
        drift.plot(
            stops, [row["drift"][name] for row in stretches], color=colour, alpha=0.7, label=memory if first else None
        )
    drift.set_ylabel("drift of each layer's memories")
    if stretches[-1]["drift"]:
        drift.legend(fontsize=8, frameon=False, loc="upper left", ncols=3)
        drift.margins(y=0.2)
    else:
        drift.text(0.5, 0.5, "no memories", transform=drift.transAxes, ha="center", color=MUTED)
    for axes in panels[0]:
        _by_length(axes, stops, "position in the text (tokens)")
        axes.axvline(trained_tokens, color=MUTED, linestyle=":")
    if needles:
        _plot_needles(panels[1], needles, trained_tokens)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=11)
    save_figure(figure, path)


def _plot_needles(panels: Any, needles: Sequence[Mapping[str, Any]], trained_tokens: int) -> None:
    """Answers right and nats gained by kind, and a map of nats gained by depth and length."""
    lengths = sorted({row["length"] for row in needles})
    by_kind, gained, by_depth = panels
    for axes, figure, label in (
        (by_kind, "right", "share of answers right"),
        (gained, "nats_gained", "nats gained by the needle"),
    ):
        for kind in dict.fromkeys(row["kind"] for row in needles):
            rows = [row for row in needles if row["kind"] == kind and row["depth"] is None]
            axes.plot([row["length"] for row in rows], [row[figure] for row in rows], marker="o", label=kind)
        axes.set_ylabel(label)
        axes.axvline(trained_tokens, color=MUTED, linestyle=":")
        _by_length(axes, lengths, "tokens of the haystack")
    by_kind.set_ylim(-0.03, 1.03)
    gained.axhline(0, color=MUTED, linewidth=0.8)
    by_kind.legend(fontsize=8, frameon=False)
    depths = sorted({row["depth"] for row in needles if row["depth"] is not None})
    if not depths:
        by_depth.set_axis_off()
        return
    values = {(row["depth"], row["length"]): row["nats_gained"] for row in needles}
    grid = [[values[depth, length] for length in lengths] for depth in depths]
    most = max(0.1, *(abs(value) for row in grid for value in row))
    by_depth.imshow(grid, cmap="RdYlGn", vmin=-most, vmax=most, aspect="auto")
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            by_depth.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8)
    by_depth.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
    by_depth.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    by_depth.set_xlabel("tokens of the haystack")
    by_depth.set_ylabel("depth of one number")
    by_depth.set_title("nats gained", fontsize=9, loc="left")


def _by_length(axes: Any, ticks: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [_short(tick) for tick in ticks], rotation=45, fontsize=8)
    axes.set_xticks([], minor=True)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _short(tokens: int) -> str:
    """65536 -> '64K'."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return str(tokens)
