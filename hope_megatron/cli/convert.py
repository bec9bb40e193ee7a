"""The old spelling of `hope checkpoint`, `hope export` and `hope import`: says the new words. It goes with the next release.

Examples:

    hope convert runs/NAME --to hf DIR          is now  hope export hf runs/NAME DIR
    hope convert inspect runs/NAME              is now  hope checkpoint inspect runs/NAME
    hope convert DIR --from FORMAT --to run F   is now  hope import FORMAT DIR F
"""

from __future__ import annotations

import argparse
import shlex

from hope_megatron.checkpoint.errors import ModelReferenceError

_LAYOUT = ("tp", "dp", "zero_stage")
_OPTIONS = (*_LAYOUT, "tokenizer", "max_shard_gib", "weights")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the old arguments."""
    parser.add_argument("words", nargs="*", metavar="SOURCE")
    parser.add_argument("--from", dest="format")
    parser.add_argument("--to", nargs=2)
    for option in _OPTIONS:
        parser.add_argument(f"--{option.replace('_', '-')}")
    parser.add_argument("--sequence-parallel", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Say the new command."""
    raise ModelReferenceError(f"hope convert has new names; say: hope {shlex.join(new_words(args))}")


def new_words(args: argparse.Namespace) -> list[str]:
    """The same wish in the new words."""
    options = [w for name in _OPTIONS if (value := getattr(args, name)) for w in (f"--{name.replace('_', '-')}", value)]
    options += ["--sequence-parallel"] if args.sequence_parallel else []
    source = args.words[:1] or ["RUN"]
    name = {"hf-llama": "llama", None: "hf"}.get(args.format, args.format)
    if source[0] in ("inspect", "average", "weights"):
        return ["checkpoint", *args.words, *options]
    if args.to is None:
        if args.format in (None, "checkpoint"):
            return ["checkpoint", "reshard", *args.words, *options]
        return ["import", name, *source, "--checkpoint", *args.words[1:], *options]
    to, path = args.to
    if to == "run":
        return ["import", name, *source, path]
    if to == "model":
        return ["import", name, *source, "--model", path]
    return ["export", to, *source, path, *options]
