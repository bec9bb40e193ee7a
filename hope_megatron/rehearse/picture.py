"""A rehearsal as a picture: memory over the step, and where the device's time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hope_megatron.config.roofline import LIMIT_IN_WORDS
from hope_megatron.runtime.files import replacing

_COLORS = {
    "forward": "#4C78A8",
    "backward": "#E4572E",
    "reduction": "#54A24B",
    "update": "#B279A2",
}
_BARS = ("#4C78A8", "#E4572E", "#54A24B", "#B279A2", "#F2B701", "#8C8C8C", "#72B7B2", "#9D755D")


def draw(found: dict[str, Any], out: Path) -> None:
    """Write a PNG of a verdict."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    memory, time = figure.subplots(2, 1, height_ratios=[3, 2])
    _draw_memory(memory, found)
    _draw_time(time, found)
    figure.suptitle(
        f"{found['name']}, rank {found['rank']} of {found['world_size']}, {found['hardware']} (rehearsed, not measured)",
        x=0.01,
        ha="left",
        fontweight="bold",
    )
    with replacing(out) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _draw_memory(axes: Any, found: dict[str, Any]) -> None:
    at = 0
    seen: set[str] = set()
    for part in found["memory_timeline"]:
        phase, points = part["segment"].split("/")[0], part["bytes"]
        xs = [at + i for i in range(len(points))]
        at = xs[-1]
        label = None if phase in seen else phase
        seen.add(phase)
        axes.fill_between(
            xs, [point / 1e9 for point in points], color=_COLORS.get(phase, "#8C8C8C"), label=label, linewidth=0
        )
    at_rest, last = 0.0, at
    for name, size in found["peak_memory_breakdown"].items():
        if name != "activations and temporaries" and size > 0.002 * found["peak_memory_bytes"]:
            at_rest += size / 1e9
            axes.axhline(at_rest, color="black", linewidth=0.6, linestyle=(0, (4, 3)))
            axes.annotate(name, (0, at_rest), xytext=(3, -11), textcoords="offset points", fontsize=8, color="white")
    axes.axhline(found["peak_memory_bytes"] / 1e9, color="black", linewidth=1.0)
    axes.annotate(
        f"peak {found['peak_memory_bytes'] / 1e9:.1f} GB, {found['peak_at']}",
        (last, found["peak_memory_bytes"] / 1e9),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    axes.set_xlim(0, max(last, 1))
    axes.set_ylim(0, 1.15 * found["peak_memory_bytes"] / 1e9)
    axes.set_xticks([])
    axes.set_ylabel("memory of the GPU (GB)")
    axes.set_title("the last micro-batch of a step, and the update", loc="left", fontsize=10)
    axes.legend(frameon=False, loc="upper left", ncols=len(seen), fontsize=9)


def _draw_time(axes: Any, found: dict[str, Any]) -> None:
    phases = list(found["phases"])
    families = sorted({family for phase in found["seconds_by_family"].values() for family in phase})
    left = [0.0] * len(phases)
    for family, color in zip(families, _BARS * 2):
        widths = [found["seconds_by_family"].get(phase, {}).get(family, 0.0) for phase in phases]
        axes.barh(phases, widths, left=left, color=color, label=family)
        left = [a + b for a, b in zip(left, widths)]
    network = [found["phases"][phase]["network_s"] for phase in phases]
    axes.barh(phases, network, left=left, color="black", label="network, exposed")
    launches = [found["phases"][phase]["launch_s"] for phase in phases]
    axes.scatter(launches, phases, marker="|", s=400, color="black", label="launches, by the host")
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step")
    axes.set_title(
        f"bound by {LIMIT_IN_WORDS[found['limit']]}: {found['tokens_per_second']:,.0f} tokens/s per GPU",
        loc="left",
        fontsize=10,
    )
    axes.legend(frameon=False, fontsize=8, ncols=2)
