"""The pictures of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hope_megatron.runtime.files import replacing
from hope_megatron.sweep.analysis import FamilyAnalysis, columns
from hope_megatron.sweep.laws import Array, LossLaw

_UNITS = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))
_COLOURS = ("#E4572E", "#4C78A8", "#54A24B", "#B279A2", "#F2B134", "#79706E")
_LOSS = "loss (nats per token)"
_FLOPS = "training FLOPs"
_PANELS_ACROSS = 2


def plot_curves(families: Sequence[FamilyAnalysis], out: Path) -> bool:
    """Training loss against compute, one line per run, coloured by size."""
    families = [family for family in families if any(run.curve is not None for run in family.runs)]
    if not families:
        return False
    figure, panels = _panels(len(families))
    for axes, family in zip(panels, families, strict=True):
        sizes = sorted({run.parameters for run in family.runs})
        shades = dict(zip(sizes, _shades(len(sizes)), strict=True))
        for run in family.runs:
            if run.curve is not None:
                axes.plot(run.curve.flops, run.curve.loss, color=shades[run.parameters], linewidth=1.2)
        for size in sizes:
            axes.plot([], [], color=shades[size], label=f"{_si(size)} parameters")
        if family.envelope is not None:
            points = family.envelope.point.points
            axes.plot(points[:, 0], points[:, 3], ".", color="black", markersize=2.5, label="envelope")
        _finish(axes, family.family, _FLOPS, _LOSS)
        axes.legend(frameon=False, fontsize=8)
    return _save(figure, out)


def plot_profiles(families: Sequence[FamilyAnalysis], out: Path) -> bool:
    """Loss against size at equal compute, with its parabolas and their minima."""
    families = [family for family in families if family.profiles]
    if not families:
        return False
    figure, panels = _panels(len(families))
    for axes, family in zip(panels, families, strict=True):
        for profile, shade in zip(family.profiles, _shades(len(family.profiles)), strict=True):
            valley = profile.valley
            grid = np.geomspace(valley.x.min(), valley.x.max(), 100)
            axes.plot(valley.x, valley.loss, "o", color=shade, markersize=5)
            axes.plot(grid, valley(grid), color=shade, linewidth=1.2, label=f"{_exponent(profile.flops)} FLOPs")
            if not valley.problem:
                axes.plot(*valley.minimum, "*", color=shade, markersize=13, markeredgecolor="black")
        _finish(axes, family.family, "parameters", _LOSS)
        axes.legend(frameon=False, fontsize=8)
    return _save(figure, out)


def plot_frontier(families: Sequence[FamilyAnalysis], target_flops: float, out: Path) -> bool:
    """Families side by side: the best loss, size and number of tokens that compute buys, with the bands of approach 3."""
    families = [family for family in families if family.law is not None]
    if not families:
        return False
    figure, panels = _panels(3)
    expected = [
        _draw_frontier(panels, family, target_flops, _COLOURS[number % len(_COLOURS)])
        for number, family in enumerate(families)
    ]
    for axes, title, label in zip(panels, ("loss", "size", "tokens"), (_LOSS, "parameters", "tokens"), strict=True):
        _finish(axes, f"optimal {title}", _FLOPS, label)
        axes.axvline(target_flops, color="#999999", linestyle=":", linewidth=1)
        high = axes is panels[0]  # where the lines leave room
        axes.annotate(
            "recommended",
            (target_flops, 0.98 if high else 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(-3, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top" if high else "bottom",
            fontsize=7,
            color="#777777",
        )
    _look_at_runs(panels, families, expected)
    panels[0].legend(frameon=False, fontsize=8)
    if panels[2].get_legend_handles_labels()[1]:
        panels[2].legend(frameon=False, fontsize=8)
    return _save(figure, out)


def _draw_frontier(panels: Sequence[Axes], family: FamilyAnalysis, target_flops: float, colour: str) -> float:
    """Draw one family; returns the lowest loss that its law expects."""
    assert family.law is not None
    _, _, c, loss = columns(family.runs)
    grid = np.geomspace(c.min(), max(target_flops, c.max()), 60)
    law, level = family.law, family.law.level
    for axes, name in zip(panels, ("loss", "parameters", "tokens"), strict=True):
        lines = np.array([_optima(one, family, grid, name) for one in (law.point, *law.resamples)])
        low, high = np.nanquantile(lines[1:], [(1 - level) / 2, (1 + level) / 2], axis=0)
        axes.plot(
            grid,
            lines[0],
            color=colour,
            linewidth=1.8,
            label=f"{family.family}, approach 3" if name == "loss" else None,
        )
        axes.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)
    panels[0].plot(c, loss, "o", color=colour, markersize=3, alpha=0.6)
    for frontier, style, label in ((family.isoflop, "--", "approach 2"), (family.envelope, ":", "approach 1")):
        if frontier is not None:
            panels[1].plot(grid, frontier.point.parameters(grid), style, color=colour, linewidth=1.2)
            panels[2].plot(grid, frontier.point.tokens(grid), style, color=colour, linewidth=1.2)
            if label not in panels[2].get_legend_handles_labels()[1]:
                panels[2].plot([], [], style, color="#555555", linewidth=1.2, label=label)
    return float(np.nanmin(_optima(law.point, family, grid, "loss")))


def _look_at_runs(panels: Sequence[Axes], families: Sequence[FamilyAnalysis], expected: Sequence[float]) -> None:
    """Axes that hold the runs, the lowest expected losses, and sizes to a factor of 10 beyond those that ran: a band without an
    end would dwarf everything."""
    losses = np.concatenate([columns(family.runs)[3] for family in families])
    low, high = min([losses.min(), *expected]), losses.max()
    panels[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    for axes, name in zip(panels[1:], ("parameters", "tokens"), strict=True):
        measured = [getattr(run, name) for family in families for run in family.runs]
        axes.set_yscale("log")
        axes.set_ylim(min(measured) / 3, 10 * max(measured))


def _optima(law: LossLaw, family: FamilyAnalysis, grid: Array, name: str) -> list[float]:
    return [getattr(law.optimum(float(c), family.compute), name) for c in grid]


def plot_residuals(families: Sequence[FamilyAnalysis], out: Path) -> bool:
    """What the law leaves over, against size and tokens; outliers are named."""
    families = [family for family in families if family.fit is not None]
    if not families:
        return False
    figure, panels = _panels(2)
    for number, family in enumerate(families):
        assert family.fit is not None
        runs = family.fresh
        residuals = 100 * family.fit.log_residuals
        outliers = {outlier.name for outlier in family.outliers}
        for axes, name in zip(panels, ("parameters", "tokens"), strict=True):
            x = [getattr(run, name) for run in runs]
            axes.plot(
                x,
                residuals,
                "o",
                color=_COLOURS[number % len(_COLOURS)],
                markersize=4.5,
                alpha=0.8,
                label=family.family,
            )
            for run, at, residual in zip(runs, x, residuals, strict=True):
                if run.name in outliers:
                    axes.annotate(run.name, (at, residual), fontsize=7, xytext=(4, 4), textcoords="offset points")
    for axes, name in zip(panels, ("parameters", "tokens"), strict=True):
        axes.axhline(0, color="#999999", linewidth=1)
        _finish(axes, "residuals of approach 3", name, "measured over fitted loss - 1 (%)")
    panels[0].legend(frameon=False, fontsize=8)
    return _save(figure, out)


def plot_valleys(families: Sequence[FamilyAnalysis], kind: str, label: str, out: Path) -> bool:
    """Loss against a hyperparameter at every size and length. `kind` is "lr" or "batch"."""
    families = [family for family in families if getattr(family, f"{kind}_valleys")]
    if not families:
        return False
    figure, panels = _panels(len(families))
    for axes, family in zip(panels, families, strict=True):
        valleys = getattr(family, f"{kind}_valleys")
        for tuned, shade in zip(valleys, _shades(len(valleys)), strict=True):
            valley = tuned.valley
            grid = np.geomspace(valley.x.min(), valley.x.max(), 100)
            axes.plot(valley.x, valley.loss, "o", color=shade, markersize=4)
            axes.plot(
                grid, valley(grid), color=shade, linewidth=1.2, label=f"width {tuned.width}, {_si(tuned.tokens)} tokens"
            )
            if not valley.problem:
                axes.plot(*valley.minimum, "*", color=shade, markersize=12, markeredgecolor="black")
        _finish(axes, family.family, label, _LOSS)
        axes.legend(frameon=False, fontsize=8)
    return _save(figure, out)


def _panels(count: int) -> tuple[Figure, list[Any]]:
    """Panels of readable size: two beside each other, for a page of 62 rem."""
    across = min(count, _PANELS_ACROSS)
    down = math.ceil(count / across)
    figure = Figure(figsize=(5.0 * across + 0.5, 4.0 * down), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid[:count]


def _shades(count: int) -> list[Any]:
    return [colormaps["viridis"](0.9 * i / max(count - 1, 1)) for i in range(count)]


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _number_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis as a person would write them (200K, 0.005), few enough not to touch each other."""
    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    numbers = (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
    axis.set_major_locator(LogLocator(subs=numbers, numticks=12))
    form = _exponent if axis.get_label_text() == _FLOPS else _si
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axis.set_minor_formatter(NullFormatter())


def _exponent(value: float) -> str:
    """8e11."""
    return f"{value:.1e}".replace(".0e", "e").replace("e+", "e").replace("e0", "e")


def _si(value: float) -> str:
    """Three digits and a unit: 138K, 1.2M."""
    value = float(f"{value:.3g}")
    for size, unit in _UNITS:
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _save(figure: Figure, out: Path) -> bool:
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                _number_ticks(axis)
    with replacing(out) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return True
