"""What a resumed run does differently from the steps before it: said, written to history.json, carried by its checkpoints.

history.json holds the configuration of the newest start, and every change that the run's weights went through, each with the step
after which it held (see config/changes.py). A run that goes back to an earlier checkpoint has the history of that checkpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hope_megatron.config.changes import Changes, describe_changes, differences, settings_changes, settings_entry
from hope_megatron.config.run import RunConfig
from hope_megatron.runtime.files import write_json
from hope_megatron.training.metrics import read_metrics
from hope_megatron.training.run_directory import RunDirectory, RunDirectoryError

log = logging.getLogger(__name__)

History = list[dict[str, Any]]

_MAX_TAG_CHARACTERS = 5000
"""MLflow's limit."""
_PROCESSES = "processes"
_SCHEDULE_KEYS = tuple(f"optim.{name}" for name in ("schedule", "warmup_steps", "decay_steps", "min_lr_ratio")) + (
    "training.steps",
)


def resumed_history(description: Mapping[str, Any], config: RunConfig, world_size: int) -> tuple[History, Changes]:
    """The history of a run that goes on from a checkpoint.

    Args:
        description: the checkpoint's: `config`, `layout`, `progress` and, if it has one, `history`.
        config: what the run is set to now.
        world_size: ranks now.

    Returns:
        (history with this start in it, what this start changed)
    """
    changes = differences(
        {**completed_config(description["config"]), _PROCESSES: description["layout"]["world_size"]},
        {**config.model_dump(mode="json"), _PROCESSES: world_size},
    )
    history: History = list(description.get("history", ()))
    if changes:
        history.append(settings_entry(description["progress"]["step"], changes))
    return history, changes


def completed_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration with the defaults of fields that did not exist then; as it is where it does not load today."""
    try:
        return RunConfig.model_validate_json(json.dumps(config), strict=True).model_dump(mode="json")
    except ValueError:
        return dict(config)


def announce_changes(changes: Changes, step: int, file: Path) -> None:
    """Say what differs, and how to have it back."""
    if not changes:
        return
    lines = "".join(f"\n  {describe_changes({key: values})}" for key, values in changes.items())
    kept = next((f"{key}={before}" for key, (before, _) in changes.items() if key.startswith("optim.")), None)
    hint = f", for example {kept}" if kept else ""
    log.warning(
        "settings differ from those of the steps up to %d (an override that is left off counts as a change):%s\n"
        "  To keep what the run had, give it again%s. Kept in %s",
        step,
        lines,
        hint,
        file,
    )


def outlook(config: RunConfig, directory: RunDirectory) -> list[str]:
    """What a run would do otherwise than at its newest start, for a dry run; empty for a new run."""
    try:
        before = json.loads(directory.history.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    changes = differences(before, config.model_dump(mode="json"))
    lines = [f"changed since the newest start: {describe_changes(changes)}"] if changes else []
    step = max((record["step"] for record in read_metrics(directory.metrics)), default=0)
    rise = learning_rate_rise(before, config, step)
    return lines if rise is None else [*lines, f"warning: {rise}"]


def write_history(file: Path, config: RunConfig, history: History) -> None:
    """Write history.json."""
    write_json(file, {"config": config.model_dump(mode="json"), "history": history})


def read_history(directory: RunDirectory) -> History:
    """What the run went through; empty for a run without history.json.

    Raises:
        RunDirectoryError: the file is damaged.
    """
    file = directory.history
    if not file.exists():
        return []
    try:
        history: History = json.loads(file.read_text(encoding="utf-8"))["history"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(
            f"{file} is damaged ({error!r}): move it away; the next start of the run writes it"
        ) from None
    return history


def history_tags(history: History) -> dict[str, str]:
    """Tags for MLflow, whose parameters never change: `settings from step 7` -> `optim.lr 0.001 -> 0.05`."""
    return {
        f"settings from step {step + 1}": describe_changes(changes)[:_MAX_TAG_CHARACTERS]
        for step, changes in settings_changes(history)
    }


def learning_rate_rise(before: Mapping[str, Any], config: RunConfig, step: int) -> str | None:
    """Why the schedule raises the learning rate where a run goes on, and what to choose instead; None where it does not.

    Args:
        before: configuration of the steps so far, as JSON values.
        config: configuration of the steps to come.
        step: steps done.
    """
    optim, total_steps = config.optim, config.training.steps
    if not 0 < step < total_steps or step < before["optim"]["warmup_steps"]:
        return None
    reached = _multiplier(before["optim"], before["training"]["steps"], step - 1)
    following = {s: _multiplier(optim.model_dump(), total_steps, s) for s in _spread(step, total_steps)}
    was, will_be = reached * before["optim"]["lr"], following[step] * optim.lr
    if following[step] <= reached or will_be <= was * 1.001:
        return None
    peak = max(following, key=lambda s: following[s])
    highest = f", {following[peak] * optim.lr:.2g} at step {peak + 1:,}" if peak > step else ""
    changed = [key for key in differences(before, config.model_dump(mode="json")) if key in _SCHEDULE_KEYS]
    instead = f"optim.schedule=constant optim.lr={was:.4g}"
    if optim.vector_lr is not None:
        instead += f" optim.vector_lr={reached * optim.vector_lr:.4g}"
    return (
        f"the learning rate goes up again: {was:.2g} at step {step:,}, {will_be:.2g} at step {step + 1:,}{highest}. "
        f"The {before['optim']['schedule']} schedule had decayed it, and {' and '.join(changed)} changed that schedule. What the "
        f"decay gained is lost at first. To go on at the rate that was reached: `{instead}`. For runs that may be extended: "
        "optim.schedule=wsd, and resume from a checkpoint before its decay (checkpoint.keep_every keeps some)"
    )


def _multiplier(optim: Mapping[str, Any], total_steps: int, step: int) -> float:
    from hope_megatron.optim.schedule import lr_at  # imports torch, which a dry run of a new run does without

    return lr_at(step, SimpleNamespace(**optim, total_steps=total_steps))


def _spread(first: int, end: int) -> range:
    """At most about a thousand steps, `first` among them."""
    return range(first, end, max(1, (end - first) // 1000))
