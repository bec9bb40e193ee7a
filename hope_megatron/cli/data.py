"""From raw text to verified token shards, and looking into them."""

from __future__ import annotations

import argparse

from data_pipeline.cli import add_data_commands


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands of `hope data`."""
    add_data_commands(parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True))


def run(args: argparse.Namespace) -> int:
    """Run one of them."""
    return int(args.func(args))
