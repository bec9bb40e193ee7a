"""Checkpoints into other layouts and formats and back, each conversion proven by reading its result; what a checkpoint holds.

SOURCE is a run (its newest checkpoint), RUN@STEP or a checkpoint, unless said otherwise.

Examples:

    hope convert runs/NAME --to hf DIR                     Hugging Face layout, with its own modelling code
    hope convert DIR --to run CONFIG                       start the run of a run file from an exported model
    hope convert runs/NAME@500 --tp 2 --zero-stage 1 OUT   the checkpoint for another layout; --dp N for other ranks
    hope convert runs/NAME --to torch_dist DIR             Megatron-Core's distributed format, optimizer and all
    hope convert runs/NAME --to deepspeed DIR              DeepSpeed's universal checkpoint
    hope convert runs/NAME --tp 2 --to deepspeed DIR       or, with a layout, the files of its own save_checkpoint
    hope convert DIR --from torch_dist OUT                 the way back (or deepspeed), in the layout it had or --tp ...
    hope convert DIR --from torch_dist --to run CONFIG     start a run from the weights alone, whoever wrote them
    hope convert LLAMA --from hf-llama --to model FILE     the model section for a Llama checkpoint as Hope-Attention
    hope convert LLAMA --from hf-llama --to run CONFIG     start a run from it: its MLPs are the levels' initial states
    hope convert average RUN@800 RUN@900 RUN@1000 OUT      mean of the weights; --weights 1,1,2 for another one
    hope convert weights runs/NAME OUT                     the weights alone, without the optimizer's states
    hope convert inspect runs/NAME                         progress, layout, history, parameters and digests
"""

from __future__ import annotations

import argparse
import logging
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hope_megatron.cli.models import ModelReferenceError, prepare_process

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipeline.tokenizer import Tokenizer
    from hope_megatron.convert.layout import Layout
    from hope_megatron.convert.rewrite import Rewritten
    from hope_megatron.convert.source import CheckpointSource

FORMS = (
    "say `hope convert SOURCE --to hf DIR` (or torch_dist, deepspeed), `DIR --from FORMAT OUT`, `DIR --to run CONFIG`, "
    "`SOURCE --tp N --zero-stage S OUT`, "
    "`inspect SOURCE`, `average SOURCE SOURCE ... OUT` or `weights SOURCE OUT`; see hope convert --help"
)
_EXPORTS = ("hf", "torch_dist", "deepspeed")
_IMPORTS = ("hf", "hf-llama", "torch_dist", "deepspeed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("words", nargs="+", metavar="SOURCE", help="[inspect | average | weights] SOURCE ... [OUT]")
    parser.add_argument(
        "--from", dest="format", choices=("checkpoint", *_IMPORTS), help="what SOURCE is (default: one of ours)"
    )
    parser.add_argument(
        "--to", nargs=2, metavar=("FORMAT", "PATH"), help="hf, torch_dist or deepspeed and DIR; run CONFIG"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: the one the run was trained with")
    parser.add_argument(
        "--max-shard-gib", type=float, default=4.0, metavar="N", help="size of a weight file (default 4)"
    )
    parser.add_argument(
        "--weights", metavar="W,W,...", help="of `average`: one number per checkpoint (default: all alike)"
    )
    layout = parser.add_argument_group("another layout")
    layout.add_argument("--tp", type=int, metavar="N", help="tensor-parallel ranks (default: as it is)")
    layout.add_argument("--dp", type=int, metavar="N", help="data-parallel ranks (default: as many ranks as it has)")
    layout.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), help="ZeRO stage (default: as it is)")
    layout.add_argument(
        "--sequence-parallel", action="store_true", help="with sequence parallelism (needs --tp 2 or more)"
    )


class _Form(NamedTuple):
    """A way to call the command."""

    num_words: int
    run: Callable[[argparse.Namespace], int]


def run(args: argparse.Namespace) -> int:
    """Find out what was asked for, and do it."""
    form = _find_form(args)
    if len(args.words) != form.num_words:
        raise ModelReferenceError(FORMS)
    if not args.max_shard_gib > 0:
        raise ModelReferenceError(f"--max-shard-gib {args.max_shard_gib:g} must be positive")
    for option in ("tp", "dp"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise ModelReferenceError(f"--{option} {getattr(args, option)} must be at least 1")
    prepare_process()
    return form.run(args)


def _find_form(args: argparse.Namespace) -> _Form:
    if args.to is None:
        return _find_form_without_target(args)
    to = args.to[0]
    if _wants_layout(args) and to != "deepspeed":
        raise ModelReferenceError(f"--tp, --dp, --zero-stage and --sequence-parallel have no meaning with --to {to}")
    if to == "model":
        if args.format != "hf-llama":
            raise ModelReferenceError("--to model FILE goes with --from hf-llama")
        return _Form(1, _write_model_section)
    if to == "run":
        if args.format == "checkpoint":
            raise ModelReferenceError(
                "--from checkpoint does not lead --to run; `hope train FILE --resume CHECKPOINT` does"
            )
        return _Form(1, _import)
    if to not in _EXPORTS:
        raise ModelReferenceError(
            f"unknown format {to!r}; use --to {', '.join(_EXPORTS)} DIR, --to run CONFIG or --to model FILE"
        )
    if args.format not in (None, "checkpoint"):
        raise ModelReferenceError(f"--from {args.format} does not lead --to {to}")
    if to == "deepspeed" and _wants_layout(args):
        return _Form(1, _export_native)
    return _Form(1, _export_huggingface if to == "hf" else _export)


def _find_form_without_target(args: argparse.Namespace) -> _Form:
    if args.format in ("torch_dist", "deepspeed"):
        return _Form(2, _read_back)
    if args.format in (None, "checkpoint"):
        if args.words[0] == "weights":
            return _Form(3, _weights)
        if args.words[0] == "average":
            return _Form(max(4, len(args.words)), _average)
        if _wants_layout(args):
            return _Form(2, _reshard)
        if args.words[0] == "inspect":
            return _Form(2, _inspect)
    raise ModelReferenceError(FORMS)


def _wants_layout(args: argparse.Namespace) -> bool:
    return args.sequence_parallel or any(value is not None for value in (args.tp, args.dp, args.zero_stage))


def _export_huggingface(args: argparse.Namespace) -> int:
    from data_pipeline.tokenizer import Tokenizer
    from hope_megatron.convert.huggingface import export_huggingface
    from hope_megatron.convert.source import find_checkpoint

    source = find_checkpoint(args.words[0])
    tokenizer = Tokenizer.load(args.tokenizer or source.config.data.tokenizer)
    export = export_huggingface(
        source,
        Path(args.to[1]),
        tokenizer,
        heldout=_heldout_sequence(source, tokenizer) if source.probe is None else None,
        max_shard_bytes=int(args.max_shard_gib * 2**30),
    )
    print(
        f"{export.directory}: {export.num_parameters:,} parameters, {export.weight_bytes / 2**20:,.1f} MiB of weights"
    )
    print(f"checked: {export.check}")
    return 0


def _heldout_sequence(source: CheckpointSource, tokenizer: Tokenizer) -> Tensor | None:
    """[1, T] of the run's held-out tokens; None if it has none, or they are no longer where they were."""
    import torch

    from hope_megatron.cli.heldout import manifest_tokens

    manifest = source.config.data.heldout
    if manifest is None or not manifest.exists():
        return None
    tokens = manifest_tokens(manifest, tokenizer, source.config.training.seq_length)
    return torch.from_numpy(tokens[:-1]).unsqueeze(0)


def _export(args: argparse.Namespace) -> int:
    from hope_megatron.convert.deepspeed_universal import write_universal
    from hope_megatron.convert.source import find_checkpoint
    from hope_megatron.convert.torch_dist import write_torch_dist
    from hope_megatron.convert.whole import read_whole

    name, directory = args.to
    whole = read_whole(find_checkpoint(args.words[0])).with_history(f"export to {name}")
    write = {"torch_dist": write_torch_dist, "deepspeed": write_universal}[name]
    _print_exported(f"{directory}: {name}, of {whole.origin}", write(whole, Path(directory)))
    return 0


def _export_native(args: argparse.Namespace) -> int:
    from hope_megatron.convert.deepspeed_native import write_native
    from hope_megatron.convert.source import find_checkpoint
    from hope_megatron.convert.whole import read_whole

    name, directory = args.to
    whole = read_whole(find_checkpoint(args.words[0])).with_history(f"export to {name}")
    layout = _layout(args, whole.layout)
    num_elements = write_native(whole, layout, Path(directory))
    _print_exported(f"{directory}: {name} for {_in_words(layout)}, of {whole.origin}", num_elements)
    return 0


def _print_exported(what: str, num_elements: int) -> None:
    print(f"{what}\nchecked: {num_elements:,} numbers read back, all equal")


def _read_back(args: argparse.Namespace) -> int:
    from hope_megatron.convert.deepspeed_native import read_deepspeed
    from hope_megatron.convert.rewrite import write_checkpoint
    from hope_megatron.convert.torch_dist import read_torch_dist

    read = {"torch_dist": read_torch_dist, "deepspeed": read_deepspeed}[args.format]
    whole = read(Path(args.words[0])).with_history(f"import from {args.format}")
    layout = _layout(args, whole.layout) if _wants_layout(args) else whole.layout
    _print_written(write_checkpoint(whole, layout, Path(args.words[1])), whole.origin)
    return 0


def _import(args: argparse.Namespace) -> int:
    from hope_megatron.cli.train import open_sources
    from hope_megatron.config import load_run_config
    from hope_megatron.convert.begin_run import begin_run
    from hope_megatron.training.provenance import provenance
    from hope_megatron.training.state import TrainingState

    # The check of an import says what it compared.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hope_megatron.convert").setLevel(logging.INFO)
    config = load_run_config(args.to[1])
    train, _ = open_sources(config)
    beginning = {"progress": TrainingState().to_dict(), "data": train.state(0), "provenance": provenance()}
    path = begin_run(Path(args.words[0]), args.format or "hf", config, beginning)
    print(f"{path}: the weights of {args.words[0]}; start with `hope train {args.to[1]}`")
    return 0


def _write_model_section(args: argparse.Namespace) -> int:
    from hope_megatron.config import dump_config
    from hope_megatron.convert.llama import llama_model_config

    config, path = llama_model_config(Path(args.words[0])), Path(args.to[1])
    if path.exists():
        raise ModelReferenceError(f"{path} exists; name another file, or move it away")
    path.write_text("model:\n" + textwrap.indent(dump_config(config), "  "), encoding="utf-8")
    print(f"{path}: the model section of a run file; levels may be added to its cms.levels")
    return 0


def _reshard(args: argparse.Namespace) -> int:
    from hope_megatron.convert.layout import Layout
    from hope_megatron.convert.rewrite import reshard
    from hope_megatron.convert.source import find_checkpoint

    source = find_checkpoint(args.words[0])
    layout = _layout(args, Layout.of(source.checkpoint.description["layout"]))
    _print_written(reshard(source, layout, Path(args.words[1])), str(source.path))
    return 0


def _layout(args: argparse.Namespace, before: Layout) -> Layout:
    return before.changed(args.tp, args.dp, args.zero_stage, args.sequence_parallel)


def _print_written(written: Rewritten, origin: str) -> None:
    print(f"{written.directory}: {written.num_files} files for {_in_words(written.layout)}")
    print(f"checked: {written.num_elements:,} numbers read back, all equal to those of {origin}")


def _in_words(layout: Layout) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in layout.describe().items())


def _weights(args: argparse.Namespace) -> int:
    from hope_megatron.convert.rewrite import write_checkpoint
    from hope_megatron.convert.source import find_checkpoint
    from hope_megatron.convert.whole import read_whole

    whole = read_whole(find_checkpoint(args.words[1])).weights_only().with_history("extraction of the weights")
    layout = _layout(args, whole.layout) if _wants_layout(args) else whole.layout
    _print_written(write_checkpoint(whole, layout, Path(args.words[2])), whole.origin)
    return 0


def _average(args: argparse.Namespace) -> int:
    from hope_megatron.convert.average import average
    from hope_megatron.convert.rewrite import write_checkpoint
    from hope_megatron.convert.source import find_checkpoint
    from hope_megatron.convert.whole import read_whole

    *references, out = args.words[1:]
    weights = _parse_weights(args.weights, len(references))
    whole = average([read_whole(find_checkpoint(reference)) for reference in references], weights)
    layout = _layout(args, whole.layout) if _wants_layout(args) else whole.layout
    _print_written(write_checkpoint(whole, layout, Path(out)), whole.origin)
    return 0


def _parse_weights(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1.0] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise ModelReferenceError(f"--weights {text!r} are no numbers; give for example --weights 1,1,2") from None
    if len(weights) != count:
        raise ModelReferenceError(f"--weights {text} are {len(weights)} numbers for {count} checkpoints")
    return weights


def _inspect(args: argparse.Namespace) -> int:
    from hope_megatron.config.changes import describe_entry
    from hope_megatron.convert.source import find_checkpoint

    source = find_checkpoint(args.words[1])
    checkpoint, config = source.checkpoint, source.config
    progress, layout = checkpoint.description["progress"], checkpoint.description["layout"]
    size = sum(digest.size for digest in checkpoint.digests.values())
    checkpoint.verify()
    print(f"{source.path}: complete, {len(checkpoint.digests)} files, {size / 2**20:,.1f} MiB, all digests right")
    for name in checkpoint.foreign_files():
        print(f"foreign: {name} is not in the manifest, and is never read")
    print(f"run {config.name}, step {progress['step']:,} of {config.training.steps:,}, {progress['tokens']:,} tokens")
    print("written by " + ", ".join(f"{name} {value}" for name, value in layout.items()))
    print(f"commit {checkpoint.description['provenance']['commit'] or 'unknown'}")
    for entry in checkpoint.description.get("history", ()):
        print(describe_entry(entry))
    for name, record in checkpoint.parameters.items():
        shape = "x".join(map(str, record.full_shape(checkpoint.tp_size)))
        print(f"  {name:<48} {shape:>20}  {' '.join(checkpoint.states(name))}")
    return 0
