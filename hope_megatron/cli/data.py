"""From raw text to verified token shards, and looking into them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from data_pipeline.cli import add_data_commands

if TYPE_CHECKING:
    from hope_megatron.training.run_data import RunData


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands of `hope data`."""
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    add_data_commands(commands, open_run=_open_run)


def run(args: argparse.Namespace) -> int:
    """Run one of them."""
    return int(args.func(args))


def _open_run(path: str) -> RunData:
    from hope_megatron.training.run_data import open_run

    return open_run(path)
