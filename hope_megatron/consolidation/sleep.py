"""A night as a training run: the day first, if it has not been lived yet, then distillation, then the judgement of the morning."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import load_tokenizer
from hope_megatron.checkpoint.find import CheckpointSource, find_checkpoint
from hope_megatron.config import RunConfig
from hope_megatron.consolidation.day import Pairs, live, morning
from hope_megatron.consolidation.errors import ConsolidationError
from hope_megatron.consolidation.night import NightSource
from hope_megatron.consolidation.options import NightOptions, learning_levels, night_config, night_name
from hope_megatron.consolidation.replay import rows_of
from hope_megatron.consolidation.store import Day, read_day, write_day
from hope_megatron.eval.heldout import text_tokens
from hope_megatron.runtime.files import file_sha256, write_json
from hope_megatron.runtime.heartbeat import HEART
from hope_megatron.training.batches import SampleSource
from hope_megatron.training.loop import Callback, Run
from hope_megatron.training.run import run_training
from hope_megatron.training.sources import open_sources
from hope_megatron.training.step import StepResult

log = logging.getLogger(__name__)

REPORT = "consolidation.json"
_MOST_GENERAL_ROWS = 512
_HELDOUT_ROWS = 64


@dataclass(frozen=True)
class Night:
    """All that is known of a night before it begins. No weights are read."""

    base: CheckpointSource
    options: NightOptions
    config: RunConfig
    pairs: dict[str, Pairs]
    """Rows to read ("wake"), to hold ("general"), to ask about ("unseen", "heldout")."""
    begin: int
    """The token that begins a text."""

    @property
    def report(self) -> Path:
        """What the morning found."""
        return self.config.run_dir / REPORT

    @property
    def origin(self) -> dict[str, Any]:
        """What the rows of the day depend on; JSON values."""
        files = {
            name: [file_sha256(path) for path in getattr(self.options, name)] for name in ("wake", "unseen", "general")
        }
        return {"checkpoint": str(self.base.path.resolve()), **files, **self.options.of_replay}

    @property
    def outline(self) -> dict[str, Any]:
        """For a dry run."""
        levels = learning_levels(self.base.config.model.cms, self.options.levels)
        return {
            "from": str(self.base.path),
            "run": str(self.config.run_dir),
            "levels": {str(i + 1): period for i, period in levels.items()},
            "rows": {name: len(rows) for name, rows in self.pairs.items()},
            "tokens_per_row": self.config.training.seq_length,
            "replay": min(self.options.replay, len(self.pairs["wake"])),
            "dreams": self.options.dreams,
            "steps": self.config.training.steps,
            "tokens_per_step": self.config.training.tokens_per_step,
        }


def plan_night(
    reference: str | Path, options: NightOptions, out: str | None = None, overrides: tuple[str, ...] = ()
) -> Night:
    """Read the texts, and settle what the night's run is. Imports no engine and reads no weights.

    Args:
        reference: RUN, RUN@STEP or a checkpoint.
        out: name of the night's run, beside RUN; None: NAME-night-1, or one more.
        overrides: changes to its configuration.

    Raises:
        ConsolidationError, ConfigError, ConversionError, HeldoutDataError: in one line.
    """
    options.check()
    base = find_checkpoint(reference)
    if base.averaged:
        raise ConsolidationError(
            f"{reference} are averaged weights; write them as a checkpoint first (hope checkpoint weights)"
        )
    run = base.config
    tokenizer, length = load_tokenizer(run.data.tokenizer), run.training.seq_length
    wake = rows_of(text_tokens(list(options.wake), tokenizer), length)
    config = night_config(run, out or night_name(run.name), options, len(wake), overrides)
    if config.run_dir.resolve() == base.path.parent.parent.resolve():
        raise ConsolidationError(f"{config.run_dir} is the run itself; give the night another name with --out")
    if config.parallel.context_parallel > 1:
        raise ConsolidationError("a night reads whole sequences; give parallel.context_parallel=1 for it")
    if options.dreams and config.parallel.sequence_parallel:
        raise ConsolidationError(
            "--dreams makes up one token after the other, which sequence parallelism cannot divide; give "
            "parallel.sequence_parallel=false for the night"
        )
    train, heldout = open_sources(run)
    pairs = {"wake": wake, "unseen": [], "general": [], "heldout": _samples(heldout, _HELDOUT_ROWS) if heldout else []}
    if options.unseen:
        pairs["unseen"] = rows_of(text_tokens(list(options.unseen), tokenizer), length)
    if options.general:
        pairs["general"] = rows_of(text_tokens(list(options.general), tokenizer), length)
    elif options.general_share:
        pairs["general"] = _samples(train, min(_MOST_GENERAL_ROWS, max(16, min(len(wake), options.replay))))
    if not options.general_share:
        pairs["general"] = []
    return Night(base, options, config, pairs, tokenizer.eos_id)


def sleep_on_ranks(night: Night, source: SampleSource, heldout: SampleSource | None) -> Run:
    """The night in this process, one of its ranks; the same command continues a night that was stopped.

    Args:
        source: the run's training data, in the place of the day's rows until they are there.
        heldout: for its evaluation.

    Raises:
        as `run_training`; ConsolidationError: the directory holds another night.
    """

    def prepare(run: Run) -> None:
        mesh, control = run.engine.mesh, run.engine.control
        day, error = None, None
        try:
            day = read_day(night.config.run_dir, night.origin)
        except ConsolidationError as found:
            error = found
        control.raise_together(error)
        if day is None:
            if run.state.step:
                raise _no_replay(night)
            rows, figures = live(run.engine.model, night.options, night.pairs, night.begin, speaks=mesh.rank == 0)
            day = Day(rows, night.origin, figures)
            if mesh.rank == 0:
                write_day(night.config.run_dir, day)
            control.broadcast(None)  # nobody goes on before it is written
        run.train_source = day.source()

    def continued(_: SampleSource, state: Mapping[str, Any]) -> SampleSource:
        day = read_day(night.config.run_dir, night.origin)
        if day is None:
            raise _no_replay(night)
        begun: NightSource = day.source()
        begun.check_state(state)
        return begun

    return run_training(
        night.config,
        source,
        heldout,
        continue_data=continued,
        weights_of=night.base.path,
        prepare=prepare,
        callbacks=[Morning(night)],
    )


def _no_replay(night: Night) -> ConsolidationError:
    return ConsolidationError(f"{night.config.run_dir} has checkpoints but no replay; remove it, or give another --out")


class Morning(Callback):
    """After the last step: what is left without the state, into consolidation.json and the run's metrics."""

    def __init__(self, night: Night) -> None:
        self._night = night

    def after_step(self, run: Run, result: StepResult) -> None:
        if not run.is_complete:
            return
        HEART.enter("evaluate", HEART.limits.evaluation_s)
        night = self._night
        day = read_day(night.config.run_dir, night.origin)
        assert day is not None
        found = morning(run.engine.model, dict(day.figures), night.pairs)
        run.engine.model.train()
        run.metrics |= {f"night/{name}": value for name, value in flat(found).items()}
        if run.engine.mesh.rank == 0:
            write_json(night.report, {**night.outline, "figures": found})


def flat(figures: Mapping[str, Any]) -> dict[str, float]:
    """Figures by name: read/before, read/after, retention, ..."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}": float(x) for key, x in value.items()}
        elif value is not None:
            found[name] = float(value)
    return found


def read_report(night: Night) -> dict[str, Any]:
    """What the morning found."""
    report: dict[str, Any] = json.loads(night.report.read_text(encoding="utf-8"))
    return report


def _samples(stream: SampleSource, count: int) -> Pairs:
    """The first samples of a run's data as rows; what is no target stays none."""
    pairs = []
    for number in range(min(count, stream.num_samples)):
        tokens = stream.sample(number)
        pairs.append((np.maximum(tokens[:-1], 0), np.where(tokens[1:] < 0, -100, tokens[1:])))
    return pairs
