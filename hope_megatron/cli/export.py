"""Write a checkpoint in the format of another library. The files are read back and compared before they appear.

RUN is a run directory (its newest checkpoint), RUN@STEP or a checkpoint directory; with :ema its averaged weights.

Examples:

    hope export hf runs/NAME DIR                               for transformers: AutoModelForCausalLM.from_pretrained(DIR)
    hope export torch_dist runs/NAME DIR                       for Megatron-Core, optimizer states and all
    hope export deepspeed runs/NAME DIR                        for DeepSpeed, a universal checkpoint
    hope export deepspeed runs/NAME DIR --tp 2 --zero-stage 3  the files that its save_checkpoint would leave
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hope_megatron.checkpoint.errors import ModelReferenceError
from hope_megatron.cli.layout_options import add_layout_arguments, asked_layout
from hope_megatron.cli.models import prepare_process
from hope_megatron.convert.formats import FORMATS, ExportOptions, open_format

_OPTIONS = {
    "tokenizer": "--tokenizer",
    "max_shard_gib": "--max-shard-gib",
    "layout": "--tp, --dp, --zero-stage, --sequence-parallel",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = f"formats:\n{FORMATS.table()}"
    parser.add_argument("format", metavar="FORMAT", help="a format of the list below")
    parser.add_argument("run", metavar="RUN", help="the checkpoint, see above")
    parser.add_argument("directory", type=Path, metavar="DIR", help="made new; an earlier export is replaced")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: the one the run was trained with")
    parser.add_argument("--max-shard-gib", type=float, metavar="N", help="size of a weight file (default 4)")
    add_layout_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Export."""
    options = ExportOptions(args.tokenizer, args.max_shard_gib, asked_layout(args))
    if args.max_shard_gib is not None and not args.max_shard_gib > 0:
        raise ModelReferenceError(f"--max-shard-gib {args.max_shard_gib:g} must be positive")
    prepare_process()
    target = open_format(args.format)
    if target.export is None:
        raise ModelReferenceError(f"{args.format} can be imported, not exported")
    for name, words in _OPTIONS.items():
        if getattr(options, name) and name not in target.takes:
            raise ModelReferenceError(f"hope export {args.format} does not take {words}")
    from hope_megatron.checkpoint.find import find_checkpoint

    print("\n".join(target.export(find_checkpoint(args.run), args.directory, options)))
    return 0
