"""Loss and learning-rate curves from metrics.jsonl, as a PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hope_megatron.runtime.files import replacing
from hope_megatron.training.metrics import read_metrics

_TRAIN, _HELDOUT, _RATE, _REFERENCE = "#4C78A8", "#E4572E", "#54A24B", "#8C8C8C"


def plot_curves(metrics: Path, out: Path, *, title: str, references: Mapping[str, float] | None = None) -> bool:
    """Draw training loss, held-out loss and learning rate against tokens seen.

    Args:
        metrics: a metrics.jsonl.
        out: the PNG to write.
        title: name of the run.
        references: losses to draw as horizontal lines, by label, nats per token.

    Returns:
        False if there is nothing to draw yet.
    """
    records = read_metrics(metrics)
    train = [(r["train/tokens"], r["train/loss"]) for r in records if "train/loss" in r]
    heldout = [(r["train/tokens"], r["heldout/loss"]) for r in records if "heldout/loss" in r]
    rate = [(r["train/tokens"], r["train/lr"]) for r in records if "train/lr" in r]
    if not train:
        return False

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    loss_axes.plot(*zip(*train), color=_TRAIN, linewidth=1.0, alpha=0.35 if len(train) > 20 else 1.0)
    smoothed = _smooth(train)
    loss_axes.plot(*zip(*smoothed), color=_TRAIN, linewidth=2.0, label=f"training ({smoothed[-1][1]:.2f})")
    if heldout:
        label = f"held-out ({heldout[-1][1]:.2f})"
        loss_axes.plot(*zip(*heldout), color=_HELDOUT, linewidth=2.0, marker="o", markersize=4, label=label)
    for name, value in (references or {}).items():
        loss_axes.axhline(value, color=_REFERENCE, linestyle="--", linewidth=1.0)
        loss_axes.annotate(
            f"{name} {value:.2f}", (1, value), xycoords=("axes fraction", "data"), xytext=(-4, 3), ha="right", color=_REFERENCE,
            textcoords="offset points", fontsize=9,
        )  # fmt: skip
    loss_axes.set_ylabel("loss (nats per token)")
    loss_axes.set_title(title, loc="left", fontweight="bold")
    loss_axes.legend(frameon=False)
    rate_axes.plot(*zip(*rate), color=_RATE, linewidth=2.0)
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_ylim(bottom=0)
    rate_axes.set_xlabel("training tokens seen")
    rate_axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (loss_axes, rate_axes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(out) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return True


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Local straight-line fit over about an eighth of the curve: straight lines stay as they are, at the ends too."""
    half = len(points) // 16
    if half == 0:
        return points
    smoothed = []
    for i, (x, _) in enumerate(points):
        xs, ys = np.array(points[max(0, i - half) : i + half + 1]).T
        _, level = np.polyfit(xs - x, ys, 1)  # the value at x
        smoothed.append((x, float(level)))
    return smoothed
