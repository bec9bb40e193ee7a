"""Entry point of `hope`: finds the command, imports only its module, and turns user mistakes into one line.

A command is a module with `add_arguments(parser)` and `run(args) -> int`. Heavy imports belong inside `run`. A command of two
words goes before that of its first word.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import hope_megatron
from hope_megatron.runtime.disks import disk_error
from hope_megatron.runtime.world import forget_launcher


class Command(NamedTuple):
    """A row of the command table."""

    module: str
    help: str
    joins_world: bool = False
    """Whether a launcher may start it as one of several processes; all others never read a launcher's variables."""


COMMANDS = {
    "quickstart": Command("hope_megatron.cli.quickstart", "from text to a pretrained HOPE on this machine, in minutes"),
    "doctor": Command("hope_megatron.cli.doctor", "what this machine has, what is missing, and what to do about it"),
    "plan": Command("hope_megatron.cli.plan", "parameters, FLOPs, memory and time of a run, before it is run"),
    "rehearse": Command(
        "hope_megatron.cli.rehearse", "one step at any number of GPUs, without one: kernels, memory, collectives, time"
    ),
    "data": Command("hope_megatron.cli.data", "text to tokenizer to token shards; inspect and verify them"),
    "train": Command("hope_megatron.cli.train", "pretrain from a configuration", joins_world=True),
    "consolidate": Command(
        "hope_megatron.cli.consolidate",
        "wake, sleep, wake: what a run's fast memories read moves into its slower weights",
        joins_world=True,
    ),
    "launch": Command(
        "hope_megatron.cli.launch", "take a run to a Slurm cluster: submit, follow, cancel, resume; arrays and chains"
    ),
    "sweep": Command("hope_megatron.cli.sweep", "scaling laws: plan a sweep, run it, fit laws, get a recommended run"),
    "eval": Command("hope_megatron.cli.eval", "held-out loss and perplexity of a checkpoint"),
    "eval lm": Command("hope_megatron.cli.eval_lm", "tasks of lm-evaluation-harness on a model", joins_world=True),
    "eval memory": Command("hope_megatron.cli.eval_memory", "what a text does to a model's memories, as a picture"),
    "eval length": Command("hope_megatron.cli.eval_length", "a text far beyond the trained length, and needles in it"),
    "eval suite": Command(
        "hope_megatron.cli.eval_suite", "the paper's tests: small models of each family, trained here"
    ),
    "generate": Command("hope_megatron.cli.generate", "sample text from a checkpoint"),
    "report": Command("hope_megatron.cli.report", "a run as one HTML page: curves, speed, memories, events, settings"),
    "completion": Command(
        "hope_megatron.cli.completion", "completion of commands, options and names for bash, zsh and fish"
    ),
    "serve": Command(
        "hope_megatron.cli.serve", "a model over HTTP with OpenAI's interface, and sessions whose memory lasts"
    ),
    "list": Command("hope_megatron.cli.list", "what can be chosen by name: presets, optimizers, formats, suites"),
    "checkpoint": Command("hope_megatron.cli.checkpoint", "inspect, reshard and average checkpoints"),
    "export": Command(
        "hope_megatron.cli.export", "a checkpoint in the format of transformers, Megatron-Core or DeepSpeed"
    ),
    "import": Command("hope_megatron.cli.import_", "start from the files of another library, or bring an export back"),
    "convert": Command("hope_megatron.cli.convert", "the old name of checkpoint, export and import"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0: done. 1: a failure or a bug. 2: a mistake in what was asked for, said in one message. 130: Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _print_in_any_locale()
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()  # what is short is written only now
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (`| head`) has left. Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if getattr(error, "is_user_error", False):
            print(f"error: {error}", file=sys.stderr)
        elif (text := disk_error(error)) is not None:
            print(f"error: {text}", file=sys.stderr)
        else:
            raise
        return 2


def _print_in_any_locale() -> None:
    """A character that the terminal, pipe or file behind stdout or stderr cannot carry becomes a replacement, not an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test may have put something else there
            stream.reconfigure(errors="replace")


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        _top_parser().print_help()
        return 2
    module, args = parse(arguments)
    if not any(command.joins_world for command in COMMANDS.values() if command.module == module.__name__):
        forget_launcher()
    return int(module.run(args) or 0)


def parse(arguments: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The module of a command and its arguments. Prints help, or an error, and leaves, as argparse does."""
    top, pair = _top_parser(), " ".join(arguments[:2])
    name, rest = (pair, arguments[2:]) if pair in COMMANDS else (arguments[0], arguments[1:])
    if name.startswith("-"):
        top.parse_args(arguments)  # --help, --version, or an error; never returns
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        top.error(f"no command {name!r}" + (f"; did you mean {near[0]}?" if near else "; see hope --help"))
    module = importlib.import_module(COMMANDS[name].module)
    parser = command_parser(name)
    # Intermixed parsing lets options stand between positional overrides; argparse cannot do that with sub-commands.
    nested = any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)
    return module, parser.parse_args(rest) if nested else parser.parse_intermixed_args(rest)


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command of the table."""
    module = importlib.import_module(COMMANDS[name].module)
    parser = argparse.ArgumentParser(
        prog=f"hope {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return parser


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="hope",
        description=hope_megatron.__doc__,
        epilog=f"commands:\n{table}\n\n`hope COMMAND --help` says more about one of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="hope [--help] [--version] COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"hope_megatron {hope_megatron.__version__}")
    return parser
