"""The picture of a text's way through the memories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hope_megatron.eval.memory_text import TextHealth
from hope_megatron.eval.report import INK, MUTED, save_figure

_COLUMNS = 480  # positions are averaged into at most this many
_LABELS = 10  # tokens named above the map
TITLES = {"mem": "memory", "k": "keys", "v": "values", "eta": "learning rate", "alpha": "retention"}


def plot_memory(
    path: Path, health: TextHealth, title: str, token_text: Callable[[int], str], trained_tokens: int
) -> None:
    """Draw loss, rates, drift and writes by position, and the map of surprise.

    Args:
        path: the PNG to write.
        health: see `read_text`.
        title: model and text.
        token_text: from a position to the token there, as it is to be shown.
        trained_tokens: sequence length in training; marked where the text is longer.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(health.layers) * len(health.names)
    map_height = min(9.0, max(2.4, 0.22 * rows))
    figure = Figure(figsize=(15, 9.6 + map_height), layout="constrained")
    FigureCanvasAgg(figure)
    # Three panels on the first row and one per memory on the next three, all of them on one grid.
    grid = figure.add_gridspec(5, 3 * len(health.names), height_ratios=[2, 2, 2, 2, map_height + 0.7])
    _rates(figure, grid, health)
    _by_memory(figure, grid, 1, health, "drift", "distance from W₀", "relative to |W₀|")
    _by_memory(figure, grid, 2, health, "update", "change by a chunk", "relative to |W₀|")
    _by_memory(figure, grid, 3, health, "surprise", "surprise", "error before learning")
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, len(health.tokens))
        axes.tick_params(labelsize=8)
        if trained_tokens < len(health.tokens):
            axes.axvline(trained_tokens, color=MUTED, linestyle=":", linewidth=1)
    _map(figure, figure.add_subplot(grid[4, :]), health, token_text)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", color=INK)
    save_figure(figure, path, dpi=130)


def _colour(index: int, count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.1 + 0.8 * index / max(1, count - 1))


def _rates(figure: Any, grid: Any, health: TextHealth) -> None:
    """First row: loss of the tokens, learning rate and retention by layer."""
    width = len(health.names)
    loss, eta, retention = (figure.add_subplot(grid[0, i * width : (i + 1) * width]) for i in range(3))
    loss.plot(*_smooth(np.nan_to_num(health.losses, nan=np.nanmean(health.losses))), color=INK, linewidth=1.2)
    loss.set_title("loss of the token (nats)", loc="left", fontsize=10)
    for i, layer in enumerate(health.layers):
        colour = _colour(i, len(health.layers))
        eta.plot(*_smooth(layer.eta), color=colour, linewidth=1.2, label=f"layer {layer.layer}")
        retention.plot(*_smooth(layer.retention), color=colour, linewidth=1.2)
    eta.set_title("inner learning rate η", loc="left", fontsize=10)
    retention.set_title("retention α per token", loc="left", fontsize=10)
    retention.ticklabel_format(axis="y", useOffset=False)
    handles, labels = eta.get_legend_handles_labels()
    step = -(-len(handles) // 8)
    loss.figure.legend(
        handles[::step], labels[::step], loc="upper right", ncols=8, frameon=False, fontsize=9, bbox_to_anchor=(1, 1)
    )


def _by_memory(figure: Any, grid: Any, row: int, health: TextHealth, field: str, name: str, unit: str) -> None:
    first = None
    for column, memory in enumerate(health.names):
        axes = figure.add_subplot(grid[row, 3 * column : 3 * column + 3])
        for i, layer in enumerate(health.layers):
            values = getattr(layer, field)[column]
            points = _smooth(values) if field == "surprise" else _thin(layer.ends, values)
            axes.plot(*points, color=_colour(i, len(health.layers)), linewidth=1.2)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{TITLES[memory]}: {name}", loc="left", fontsize=10)
        if first is None:
            axes.set_ylabel(unit, fontsize=9)
            first = axes


def _map(figure: Any, axes: Any, health: TextHealth, token_text: Callable[[int], str]) -> None:
    """Which part of the text surprised which memory of which layer."""
    length, count = len(health.tokens), len(health.layers)
    scores = {layer.layer: layer.standardized_surprise(health.reach) for layer in health.layers}
    rows = [_bins(scores[layer.layer][i], np.max) for i in range(len(health.names)) for layer in health.layers]
    image = axes.imshow(
        np.stack(rows), aspect="auto", cmap="magma", vmin=-1, vmax=4, interpolation="nearest", extent=(0, length, len(rows), 0)
    )  # fmt: skip
    axes.set_yticks([count * (i + 0.5) for i in range(len(health.names))], [TITLES[name] for name in health.names])
    axes.hlines([count * i for i in range(1, len(health.names))], 0, length, color="white", linewidth=1.5)
    axes.set_xlabel("position in the text (tokens)", fontsize=9)
    axes.tick_params(labelsize=9, left=False)
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.02)
    bar.set_label("surprise (standard deviations)", fontsize=9)
    axes.set_title(
        "surprise against the text around: which tokens surprised which memory; layers from top to bottom in each band\n\n\n\n",
        loc="left", fontsize=10,
    )  # fmt: skip
    shown: list[float] = []
    for position in health.most_surprising(20 * _LABELS):
        if len(shown) < _LABELS and all(abs(position - other) > length / 45 for other in shown):
            shown.append(position)
            axes.annotate(
                token_text(position), (position + 0.5, 0), xytext=(0, 4), textcoords="offset points", rotation=40,
                fontsize=9, ha="left", va="bottom", color=INK, annotation_clip=False, family="monospace",
                arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0},
            )  # fmt: skip


def _bins(values: np.ndarray, reduce: Callable[[np.ndarray], Any]) -> np.ndarray:
    """Reduce values [T] over at most _COLUMNS stretches of equal length."""
    return np.array([reduce(part) for part in np.array_split(values, min(_COLUMNS, len(values)))])


def _smooth(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and means of about 120 stretches."""
    parts = np.array_split(np.arange(len(values)), min(120, len(values)))
    return np.array([part.mean() + 0.5 for part in parts]), np.array([values[part].mean() for part in parts])


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most _COLUMNS points, the last one always."""
    step = -(-len(x) // _COLUMNS)
    keep = np.unique(np.append(np.arange(0, len(x), step), len(x) - 1))
    return x[keep], y[keep]
