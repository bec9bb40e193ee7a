"""Start from the files of another library, or bring an export back.

Examples:

    hope import hf DIR RUN_FILE                 start the run of a run file from an exported model
    hope import deepspeed DIR RUN_FILE          from the weights of a DeepSpeed checkpoint (or torch_dist), whoever wrote it
    hope import deepspeed DIR RUN_FILE --optimizer-states    go on where DeepSpeed stopped: optimizer states, clocks, steps
    hope import hf DIR --tokenizer FILE         the SentencePiece model, with the tokens that fine-tuning added
    hope import llama DIR --model model.yaml    the model section that fits a Llama, Mistral or Qwen model (hf: a fine-tuned one)
    hope import llama DIR --model model.yaml --split-mlp 4096,1024    its MLP cut into levels side by side; the same logits
    hope import llama DIR RUN_FILE              start a run from it: its MLPs are the levels' initial states
    hope import torch_dist DIR --checkpoint OUT a checkpoint of ours from an earlier export, optimizer states and all
"""

from __future__ import annotations

import argparse
import logging
import textwrap
from pathlib import Path
from typing import Any

from hope_megatron.checkpoint.errors import ModelReferenceError
from hope_megatron.cli.layout_options import add_layout_arguments, asked_layout
from hope_megatron.cli.models import prepare_process
from hope_megatron.convert.formats import FORMATS, Format, open_format
from hope_megatron.runtime.files import write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = f"formats:\n{FORMATS.table()}"
    parser.add_argument("format", metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("directory", type=Path, metavar="DIR", help="what to read")
    parser.add_argument("run_file", nargs="?", metavar="RUN_FILE", help="the run that starts from the weights")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="OUT", help="write the whole checkpoint of an export of ours"
    )
    parser.add_argument("--model", type=Path, metavar="FILE", help="write the model section of a run file")
    parser.add_argument(
        "--split-mlp",
        metavar="SIZES",
        type=level_sizes,
        help="with --model: cut the MLP into levels of these hidden sizes, for example 4096,1024 (llama)",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="write the SentencePiece model that belongs to DIR"
    )
    parser.add_argument(
        "--optimizer-states",
        action="store_true",
        help="with RUN_FILE: take optimizer states and counted steps too (deepspeed)",
    )
    add_layout_arguments(parser)


def level_sizes(text: str) -> tuple[int, ...]:
    """Hidden sizes, separated by commas."""
    return tuple(int(part) for part in text.split(","))


def run(args: argparse.Namespace) -> int:
    """Import."""
    targets = (args.run_file, args.checkpoint, args.model, args.tokenizer)
    if sum(target is not None for target in targets) != 1:
        raise ModelReferenceError("give one target: RUN_FILE, --checkpoint OUT, --model FILE or --tokenizer FILE")
    if asked_layout(args) and args.checkpoint is None:
        raise ModelReferenceError("--tp, --dp, --zero-stage and --sequence-parallel need --checkpoint OUT")
    if args.optimizer_states and args.run_file is None:
        raise ModelReferenceError("--optimizer-states needs RUN_FILE, whose run goes on with them")
    if args.split_mlp and args.model is None:
        raise ModelReferenceError("--split-mlp needs --model FILE, the model section with these levels")
    prepare_process()
    source = open_format(args.format)
    if args.checkpoint is not None:
        _restore(source, args)
    elif args.model is not None:
        _write_model_section(source, args)
    elif args.tokenizer is not None:
        _write_tokenizer(source, args)
    else:
        _begin_run(args)
    return 0


def _restore(source: Format, args: argparse.Namespace) -> None:
    from hope_megatron.cli.checkpoint import write_in_layout

    if source.restore is None:
        raise ModelReferenceError(f"{args.format} holds weights only; give a run file to start a run from them")
    whole = source.restore(args.directory).with_history(f"import from {args.format}")
    write_in_layout(whole, args, args.checkpoint)


def _write_model_section(source: Format, args: argparse.Namespace) -> None:
    from hope_megatron.config import dump_config

    if source.read_model_config is None:
        raise ModelReferenceError(
            f"{args.format} holds no model section; a checkpoint of ours carries its configuration"
        )
    if args.model.exists():
        raise ModelReferenceError(f"{args.model} exists; name another file, or move it away")
    model = source.read_model_config(args.directory)
    if args.split_mlp:
        if source.split_mlp is None:
            raise ModelReferenceError(
                f"{args.format} has levels of its own; --split-mlp is for models with one MLP (llama)"
            )
        model = source.split_mlp(model, args.split_mlp)
    section = dump_config(model)
    write_text(args.model, "model:\n" + textwrap.indent(section, "  "))
    print(f"{args.model}: the model section of a run file; levels may be added to its cms.levels")


def _write_tokenizer(source: Format, args: argparse.Namespace) -> None:
    from data_pipeline.open_tokenizer import make_tokenizer

    if source.read_tokenizer is None:
        raise ModelReferenceError(f"{args.format} holds no tokenizer; use the file that the model was trained with")
    if args.tokenizer.exists():
        raise ModelReferenceError(f"{args.tokenizer} exists; name another file, or move that one")
    beside = args.directory / "tokenizer.json"
    tokenizer = make_tokenizer(source.read_tokenizer(args.directory), f"the tokenizer of {args.directory}", beside)
    tokenizer.save(args.tokenizer)
    print(
        f"{args.tokenizer}: {tokenizer.vocab_size} ids; `hope data prepare --tokenizer {args.tokenizer}` makes data with it"
    )


def _begin_run(args: argparse.Namespace) -> None:
    from hope_megatron.config import load_run_config
    from hope_megatron.convert.begin_run import begin_run, go_on
    from hope_megatron.training.provenance import provenance
    from hope_megatron.training.sources import open_sources
    from hope_megatron.training.state import TrainingState

    # The check of an import says what it compared.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hope_megatron.convert").setLevel(logging.INFO)
    config = load_run_config(args.run_file)
    train, _ = open_sources(config)

    def beginning(step: int, samples: int) -> dict[str, Any]:
        progress = TrainingState(step, samples, samples * config.training.seq_length)
        return {"progress": progress.to_dict(), "data": train.state(samples), "provenance": provenance()}

    if args.optimizer_states:
        path, what = go_on(args.directory, args.format, config, beginning), "weights, optimizer states and clocks"
    else:
        path, what = begin_run(args.directory, args.format, config, beginning(0, 0)), "weights"
    print(f"{path}: the {what} of {args.directory}; start with `hope train {args.run_file}`")
