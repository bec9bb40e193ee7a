"""Checkpoint to Hugging Face layout, proven by reading it back; the way back; and what a checkpoint holds.

Examples:

    hope convert runs/NAME --to hf DIR         the newest checkpoint of a run (or runs/NAME@STEP, or a checkpoint)
    hope convert DIR --to run CONFIG           start the run of a run file from an exported model
    hope convert inspect runs/NAME             progress, layout, parameters and digests of a checkpoint
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hope_megatron.cli.models import ModelReferenceError, prepare_process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "source", nargs="+", metavar="[inspect] SOURCE", help="a run, RUN@STEP, a checkpoint, an export"
    )
    parser.add_argument(
        "--from", dest="format", choices=("checkpoint", "hf"), help="what SOURCE is; found out by default"
    )
    parser.add_argument("--to", nargs=2, metavar=("FORMAT", "PATH"), help="hf DIR, or run CONFIG")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: the one the run was trained with")
    parser.add_argument(
        "--max-shard-gib", type=float, default=4.0, metavar="N", help="size of a weight file (default 4)"
    )


def run(args: argparse.Namespace) -> int:
    """Export, import or inspect."""
    if args.source[0] == "inspect" and len(args.source) == 2 and args.to is None:
        return _inspect(args.source[1])
    if len(args.source) != 1 or args.to is None:
        raise ModelReferenceError(
            "say `hope convert SOURCE --to hf DIR`, `--to run CONFIG`, or `hope convert inspect SOURCE`"
        )
    (source,), (to, path) = args.source, args.to
    if to not in ("hf", "run"):
        raise ModelReferenceError(f"unknown format {to!r}; use --to hf DIR or --to run CONFIG")
    if args.format not in (None, "checkpoint" if to == "hf" else "hf"):
        raise ModelReferenceError(f"--from {args.format} does not lead --to {to}")
    if not args.max_shard_gib > 0:
        raise ModelReferenceError(f"--max-shard-gib {args.max_shard_gib:g} must be positive")
    prepare_process()
    if to == "run":
        return _import(Path(source), path)
    return _export(source, Path(path), args.tokenizer, int(args.max_shard_gib * 2**30))


def _export(reference: str, out_dir: Path, tokenizer_file: Path | None, max_shard_bytes: int) -> int:
    from data_pipeline.tokenizer import Tokenizer
    from hope_megatron.convert.huggingface import export_huggingface
    from hope_megatron.convert.source import find_checkpoint

    source = find_checkpoint(reference)
    tokenizer = Tokenizer.load(tokenizer_file or source.config.data.tokenizer)
    export = export_huggingface(source, out_dir, tokenizer, max_shard_bytes=max_shard_bytes)
    print(
        f"{export.directory}: {export.num_parameters:,} parameters, {export.weight_bytes / 2**20:,.1f} MiB of weights"
    )
    print(f"checked: {export.check}")
    return 0


def _import(directory: Path, config_name: str) -> int:
    from hope_megatron.cli.train import open_sources
    from hope_megatron.config import load_run_config
    from hope_megatron.convert.from_huggingface import import_huggingface
    from hope_megatron.training.provenance import provenance
    from hope_megatron.training.state import TrainingState

    config = load_run_config(config_name)
    train, _ = open_sources(config)
    beginning = {"progress": TrainingState().to_dict(), "data": train.state(0), "provenance": provenance()}
    path = import_huggingface(directory, config, beginning)
    print(f"{path}: the weights of {directory}; start with `hope train {config_name}`")
    return 0


def _inspect(reference: str) -> int:
    from hope_megatron.convert.source import find_checkpoint

    source = find_checkpoint(reference)
    checkpoint, config = source.checkpoint, source.config
    progress, layout = checkpoint.description["progress"], checkpoint.description["layout"]
    size = sum(digest.size for digest in checkpoint.digests.values())
    checkpoint.verify()
    print(f"{source.path}: complete, {len(checkpoint.digests)} files, {size / 2**20:,.1f} MiB, all digests right")
    print(f"run {config.name}, step {progress['step']:,} of {config.training.steps:,}, {progress['tokens']:,} tokens")
    print("written by " + ", ".join(f"{name} {value}" for name, value in layout.items()))
    print(f"commit {checkpoint.description['provenance']['commit'] or 'unknown'}")
    for name, record in checkpoint.parameters.items():
        shape = "x".join(map(str, record.full_shape(checkpoint.tp_size)))
        print(f"  {name:<48} {shape:>20}  {' '.join(checkpoint.states(name))}")
    return 0
