"""Where results of an evaluation go, beside the screen: JSON, Markdown, MLflow."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hope_megatron.checkpoint.errors import ModelReferenceError
from hope_megatron.cli.output_files import check_writable
from hope_megatron.convert.open_model import OpenModel


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --json, --markdown, --png and --mlflow."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the results")
    parser.add_argument("--mlflow", action="store_true", help="add the figures to the MLflow run of the training run")


def check_output(args: argparse.Namespace, opened: OpenModel) -> None:
    """Refuse before anything is computed what cannot be written after it."""
    check_writable(args.json, args.markdown, args.png)
    if args.mlflow and opened.checkpoint is None:
        raise ModelReferenceError("--mlflow: an exported model has no MLflow run; give the run directory instead")


def write_output(
    args: argparse.Namespace, opened: OpenModel, result: Mapping[str, Any], tables: str, metrics: Mapping[str, float]
) -> None:
    """Write what was asked for.

    Args:
        tables: Markdown.
        metrics: what MLflow gets, by name.
    """
    from hope_megatron.runtime.files import write_json, write_text

    if args.json:
        write_json(args.json, result)
    if args.markdown:
        write_text(args.markdown, f"{tables}\n")
    if args.mlflow and opened.checkpoint is not None:
        from hope_megatron.checkpoint.format import checkpoint_step
        from hope_megatron.training.run_directory import RunDirectory
        from hope_megatron.training.tracking import log_evaluation

        directory = RunDirectory(opened.checkpoint.parent.parent)
        run_id = log_evaluation(directory, checkpoint_step(opened.checkpoint), metrics)
        print(f"\nMLflow run {run_id}: {', '.join(metrics)}")
