"""A day and a night from Python, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def consolidate(
    run: str | Path,
    *,
    wake: Sequence[str | Path],
    out: str | None = None,
    unseen: Sequence[str | Path] = (),
    general: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """Let a run read files by day and consolidate them at night, as `hope consolidate` does with one process.

    Args:
        run: RUN, RUN@STEP or a checkpoint; a layout of one rank, or `overrides=["parallel.tensor_parallel=1"]`.
        wake: UTF-8 files that are read.
        out: name of the night's run, which lies beside RUN; None: NAME-night-1, or one more.
        unseen, general: see `NightOptions`.
        overrides: changes to the night's configuration, `optim.lr=3e-4`.
        options: further fields of `hope_megatron.consolidation.options.NightOptions`: replay, dreams, levels, steps, ...

    Returns:
        What `consolidation.json` of the night's run holds: its directory as "run", and "figures": loss before, adapted, after...

    Raises:
        ConsolidationError, ConfigError, ConversionError: in one line.
    """
    from hope_megatron.consolidation.options import NightOptions
    from hope_megatron.consolidation.sleep import plan_night, read_report, sleep_on_ranks
    from hope_megatron.training.sources import open_sources

    read, asked, held = (tuple(map(Path, paths)) for paths in (wake, unseen, general))
    settings = NightOptions(read, asked, held, **options)
    night = plan_night(run, settings, out, tuple(overrides))
    sleep_on_ranks(night, *open_sources(night.config))
    return read_report(night)
