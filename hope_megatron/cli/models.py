"""What commands share: actions, the model and its text, the process."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path

from hope_megatron.config.training import data_location
from hope_megatron.runtime.process import apply_process_environment, available_cpus

MODEL_HELP = (
    "a run directory (its newest checkpoint), RUN@STEP, RUN:ema (averaged weights), a checkpoint, or an exported "
    "Hugging Face directory"
)


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, and what it reads: --data or --text."""
    parser.add_argument("model", help=MODEL_HELP)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data", type=data_location, metavar="MANIFEST", help="token shards; default: the run's held-out split"
    )
    source.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 text files")


def add_actions(parser: argparse.ArgumentParser, summaries: Mapping[str, str]) -> list[argparse.ArgumentParser]:
    """A parser for each action of a command, in order; `args.action` is the name of the chosen one."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    return [actions.add_parser(name, help=summary) for name, summary in summaries.items()]


def prepare_process(num_threads: int | None = None) -> None:
    """Set up a process that uses a model by itself. Call before anything imports torch.

    Args:
        num_threads: CPU threads of torch operators; None for every core.
    """
    apply_process_environment(num_threads or available_cpus())
    # Megatron-Core reports at every import that optional CUDA packages are absent; `hope doctor` says so when asked.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
