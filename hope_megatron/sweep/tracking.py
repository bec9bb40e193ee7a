"""MLflow: one parent run per sweep, whose children are the runs of its cells."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hope_megatron.config.secrets import mask_credentials, unmask_tracking_uri
from hope_megatron.runtime.files import write_json
from hope_megatron.sweep.analysis import FamilyAnalysis
from hope_megatron.sweep.plan import Plan
from hope_megatron.sweep.report import coefficient_rows
from hope_megatron.sweep.store import SweepDirectory
from hope_megatron.training.mlflow_client import TrackingError, brief, experiment_name, open_experiment, tracking_uri

log = logging.getLogger(__name__)

_PARENT_TAG = "mlflow.parentRunId"


def open_parent(plan: Plan, directory: SweepDirectory) -> None:
    """Create the sweep's run, if it is tracked and has none.

    Tracking is beside the work: a server that does not answer is logged, and the next call tries again.
    """
    config = plan.cells[0].config
    if "mlflow" not in config.tracking.names or "run_id" in _read(directory.path / "tracking.json"):
        return
    uri = tracking_uri(config)
    try:
        client, experiment_id = open_experiment(uri, experiment_name(config))
        tags = {**config.tracking.tags, "hope_megatron.sweep": plan.sweep.name}
        run = client.create_run(experiment_id, run_name=plan.sweep.name, tags=tags)
        state = {
            "uri": mask_credentials(uri),
            "experiment": experiment_name(config),
            "run_id": run.info.run_id,
            "linked": [],
        }
        write_json(directory.path / "tracking.json", state)
    except TrackingError:
        raise
    except Exception as error:  # any of a server's ways to fail
        log.warning(
            "MLflow at %s does not answer (%s); the sweep goes on without a parent run",
            mask_credentials(uri),
            brief(error),
        )


def link_children(plan: Plan, directory: SweepDirectory) -> int:
    """Make the runs of all cells that MLflow knows children of the sweep's run. Returns how many were linked now."""
    state = _read(directory.path / "tracking.json")
    if "run_id" not in state:
        return 0
    children = [(cell, _read(directory.runs / cell.name / "tracking.json").get("run_id")) for cell in plan.cells]
    new = [(cell, run_id) for cell, run_id in children if run_id and cell.name not in state["linked"]]
    if not new:
        return 0
    try:
        client, _ = open_experiment(unmask_tracking_uri(state["uri"]), state["experiment"])
        for cell, run_id in new:
            client.set_tag(run_id, _PARENT_TAG, state["run_id"])
            client.set_tag(run_id, "hope_megatron.family", cell.family)
            state["linked"].append(cell.name)
    except Exception as error:  # any of a server's ways to fail
        log.warning("MLflow does not answer (%s); the next call links what is missing", brief(error))
    write_json(directory.path / "tracking.json", state)
    return len(new)


def log_report(directory: SweepDirectory, families: Sequence[FamilyAnalysis], files: Sequence[Path]) -> None:
    """Store coefficients and files with the sweep's run, and end it. Without one there is nothing to do."""
    state = _read(directory.path / "tracking.json")
    if "run_id" not in state:
        return
    try:
        client, _ = open_experiment(unmask_tracking_uri(state["uri"]), state["experiment"])
        for family in families:
            for name, law, coefficient, estimate in coefficient_rows(family):
                if math.isfinite(estimate.value):
                    client.log_metric(state["run_id"], f"{name}/{law}/{coefficient}".replace(" ", "_"), estimate.value)
        for path in files:
            client.log_artifact(state["run_id"], str(path))
        client.set_terminated(state["run_id"], "FINISHED")
    except Exception as error:  # any of a server's ways to fail
        log.warning("MLflow does not answer (%s); the report is in %s", brief(error), directory.path)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
