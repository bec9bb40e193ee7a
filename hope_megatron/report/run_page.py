"""What `hope report` shows of a run directory, as blocks of a page."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hope_megatron.checkpoint.errors import ModelReferenceError
from hope_megatron.config.changes import describe_changes, settings_changes
from hope_megatron.config.model import CMSLevelConfig
from hope_megatron.report.document import Block, Bullets, Code, Heading, Picture, Table, Text, to_html
from hope_megatron.runtime.files import write_text
from hope_megatron.runtime.formatting import duration_text
from hope_megatron.runtime.records import read_object, read_records
from hope_megatron.training.metrics import read_metrics
from hope_megatron.training.plots import plot_curves
from hope_megatron.training.run_directory import RunDirectory
from launch.attempts import History

Records = list[dict[str, Any]]
_LAYER = re.compile(r"^((?:memory|cms)/[a-z_]+)/(?:layer_(\d+)(?:/(\w+))?|(.+))$")
_MEANINGS = {
    "memory/update_norm": "relative change of a memory by one chunk",
    "memory/drift": "distance of a memory from its learned initial state",
    "memory/surprise": "error of a memory about its targets before it learns them",
    "memory/eta": "inner learning rate",
    "memory/retention": "share of a memory that is kept per token",
    "cms/agreement": "cosine of a level's gathered gradient and its momentum, at an update",
    "cms/update_period": "update period of an adaptive level, in steps",
    "cms/update_norm": "relative size of a level's last optimizer update",
}


@dataclass(frozen=True)
class RunFiles:
    """A run directory, read."""

    directory: RunDirectory
    records: Records
    config: Mapping[str, Any]
    facts: dict[str, Any]


def read_run(path: Path) -> RunFiles:
    """Read what a page needs.

    Raises:
        ModelReferenceError: the directory holds no metrics.
    """
    directory = RunDirectory(path)
    records = read_metrics(directory.metrics)
    if not records:
        raise ModelReferenceError(
            f"{path} has no record in metrics.jsonl: it is no run, or its first step is not done yet"
        )
    config = yaml.safe_load(directory.config.read_text(encoding="utf-8")) if directory.config.is_file() else {}
    last = {name: value for record in records for name, value in record.items()}
    steps = config.get("training", {}).get("steps")
    speeds = sorted(record["speed/tokens_per_s"] for record in records if "speed/tokens_per_s" in record)
    heldout = [record["heldout/loss"] for record in records if "heldout/loss" in record]
    facts = {
        "run": config.get("name", path.name),
        "step": last["step"],
        "steps": steps,
        "training loss": last.get("train/loss"),
        "held-out loss": last.get("heldout/loss"),
        "best held-out loss": min(heldout, default=None),
        "tokens": last.get("train/tokens"),
        "tokens/s, median": speeds[len(speeds) // 2] if speeds else None,
        "time in steps": last.get("time/wall_s"),
        "starts": len(History(directory.path / "launch" / "attempts.jsonl").attempts) or None,
    }
    return RunFiles(directory, records, config, {name: value for name, value in facts.items() if value is not None})


def write_page(run: RunFiles, out: Path, samples: Sequence[str] = ()) -> None:
    """Write the page.

    Args:
        samples: continuations of a prompt by the model.
    """
    with tempfile.TemporaryDirectory(prefix="hope-report-") as folder:
        pictures = Path(folder)
        blocks = [
            *_summary(run),
            *_curves(run, pictures),
            *_speed(run, pictures),
            *_memories(run, pictures),
            *_periods(run, pictures),
            *_events(run),
            *_samples(samples),
            *_settings(run),
        ]
        write_text(out, to_html(str(run.facts["run"]), blocks))


def _summary(run: RunFiles) -> list[Block]:
    rows = [[name, _shown(name, value)] for name, value in run.facts.items()]
    done = run.facts["step"] == run.facts.get("steps")
    state = "All steps are done." if done else "**Not all steps are done**: the page shows the run as far as it is."
    return [Text(f"{state} Written {time.strftime('%Y-%m-%d %H:%M')}."), Table(["", ""], rows)]


def _shown(name: str, value: Any) -> str:
    if name == "time in steps":
        return duration_text(value)
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:,.4f}"
    return f"{value:,.0f}" if isinstance(value, (int, float)) else str(value)


def _curves(run: RunFiles, folder: Path) -> list[Block]:
    file = folder / "curves.png"
    if not plot_curves(run.directory.metrics, file, title=str(run.facts["run"])):
        return []
    return [Heading("Loss"), Picture(file, "training and held-out loss, and the learning rate")]


def _speed(run: RunFiles, folder: Path) -> list[Block]:
    lines = {
        name: _series(run.records, name) for name in ("speed/tokens_per_s", "time/data_stall_s", "train/grad_norm")
    }
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return []
    _draw(folder / "speed.png", {name: {"": points} for name, points in lines.items()})
    caption = "tokens per second over all ranks, waits for data, gradient norm"
    return [Heading("Throughput and gradients"), Picture(folder / "speed.png", caption)]


def _memories(run: RunFiles, folder: Path) -> list[Block]:
    """One panel per figure, one line per layer; several memories of a layer are averaged."""
    panels: dict[str, dict[str, dict[int, list[float]]]] = {}
    for record in run.records:
        for name, value in record.items():
            if match := _LAYER.match(name):
                line = f"layer {int(match[2])}" if match[2] else match[4].replace("_", " ")
                panels.setdefault(match[1], {}).setdefault(line, {}).setdefault(record["step"], []).append(value)
    if not panels:
        return []
    averaged = {
        panel: {line: [(step, sum(v) / len(v)) for step, v in sorted(points.items())] for line, points in lines.items()}
        for panel, lines in panels.items()
    }
    _draw(folder / "memories.png", averaged)
    meanings = [f"`{name}`: {_MEANINGS[name]}" for name in averaged if name in _MEANINGS]
    return [
        Heading("Memories"),
        Picture(folder / "memories.png", "health of memories and levels by step"),
        Bullets(meanings),
    ]


def _periods(run: RunFiles, folder: Path) -> list[Block]:
    """Update periods of the levels by step, where one of them changes over the run."""
    levels = run.config.get("model", {}).get("cms", {}).get("levels", ())
    clocks = {f"level {number}": CMSLevelConfig(**level).clock for number, level in enumerate(levels, 1)}
    if not any(clock.changes for clock in clocks.values()):
        return []
    steps = run.facts.get("steps") or run.facts["step"]
    lines = {
        name: [(step, period) for before, end, period in clock.pieces(steps) for step in (before + 1, end)]
        for name, clock in clocks.items()
    }
    _draw(folder / "periods.png", {"update period in steps": lines})
    counts = [
        f"{name}: {clock.text()}; {clock.updates(run.facts['step']):,} updates so far" for name, clock in clocks.items()
    ]
    return [
        Heading("Update periods"),
        Picture(folder / "periods.png", "update period of every level by step"),
        Bullets(counts),
    ]


def _events(run: RunFiles) -> list[Block]:
    """Starts, skips and whatever else the run recorded of itself, in the order of time."""
    rows: list[tuple[float, list[str]]] = []
    for attempt in History(run.directory.path / "launch" / "attempts.jsonl").attempts:
        rows.append((attempt.started, ["start", f"{attempt.step:,}", f"attempt {attempt.number}"]))
        if attempt.ended is not None:
            rows.append((attempt.ended, [attempt.outcome, f"{attempt.reached:,}", attempt.reason]))
    for file in (run.directory.ledger, run.directory.data_ledger):
        for entry in read_records(file)[0]:
            kind, step = str(entry.get("event", "data")), entry.get("step", "")
            more = {k: v for k, v in entry.items() if k not in ("event", "step", "time", "crc")}
            rows.append(
                (float(entry.get("time") or 0.0), [kind, f"{step}", ", ".join(f"{k} {v}" for k, v in more.items())])
            )
    if not rows:
        return []
    table = [[time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if at else "", *row] for at, row in sorted(rows)]
    return [Heading("Events"), Table(["time", "event", "step", "what"], table)]


def _samples(samples: Sequence[str]) -> list[Block]:
    return [Heading("Samples"), *(Code(sample) for sample in samples)] if samples else []


def _settings(run: RunFiles) -> list[Block]:
    history = (read_object(run.directory.history) or {}).get("history", ())
    changes = [f"after step {step:,}: {describe_changes(change)}" for step, change in settings_changes(history)]
    blocks: list[Block] = [Heading("Settings")]
    if changes:
        blocks += [Text("Changed on the way:"), Bullets(changes)]
    if run.directory.config.is_file():
        blocks.append(Code(run.directory.config.read_text(encoding="utf-8")))
    return blocks


def _series(records: Records, name: str) -> list[tuple[int, float]]:
    return [(record["step"], record[name]) for record in records if name in record]


def _draw(file: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> None:
    """Panels side by side, two in a row; lines of a panel from dark to light."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(10, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(rows, 2, squeeze=False).flat
    for axes, (name, lines) in zip(all_axes, panels.items()):
        colour = _colours(len(lines))
        for number, (label, points) in enumerate(lines.items()):
            axes.plot(
                *zip(*points), color=colour(number), linewidth=1.4, label=label, marker="." if len(points) < 30 else ""
            )
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if 1 < len(lines) <= 8:
            axes.legend(frameon=False, fontsize=8)
    for axes in list(figure.axes)[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(file, dpi=130, format="png")


def _colours(count: int) -> Callable[[int], Any]:
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    return lambda number: "#4C78A8" if count == 1 else colours(0.85 * number / (count - 1))
