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


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """MODEL, and the tokenizer that it is read with."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: the one the model was trained with")


def add_local_arguments(parser: argparse.ArgumentParser) -> None:
    """How many processes a command starts on this machine, and how often again."""
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="processes to start on this machine (default: one for each visible GPU; without GPUs tensor x context parallel)",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="stop after N restarts that came no further than the attempts before (default: %(default)s; 0: never restart)",
    )
    parser.add_argument("--oversubscribe", action="store_true", help="allow more processes than cores or GPUs")


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, and what it reads: --data or --text."""
    add_model_argument(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data", type=data_location, metavar="MANIFEST", help="token shards; default: the run's held-out split"
    )
    source.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 text files")


def add_actions(parser: argparse.ArgumentParser, summaries: Mapping[str, str]) -> list[argparse.ArgumentParser]:
    """A parser for each action of a command, in order; `args.action` is the name of the chosen one."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    return [
        actions.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        for name, summary in summaries.items()
    ]


def prepare_process(num_threads: int | None = None) -> None:
    """Set up a process that uses a model by itself. Call before anything imports torch.

    Args:
        num_threads: CPU threads of torch operators; None for every core.
    """
    apply_process_environment(num_threads or available_cpus())
    # Megatron-Core reports at every import that optional CUDA packages are absent; `hope doctor` says so when asked.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
