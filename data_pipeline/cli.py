"""The commands `hope data ...`. Parsing only: each command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from data_pipeline.cli_epilogs import EPILOGS

if TYPE_CHECKING:
    from data_pipeline.commands import RunSamples

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

OpenRun = Callable[[str], "RunSamples"]


def register(subparsers: Commands) -> None:
    """Add ``data`` with its commands to a command line. Each sets ``func``: parsed arguments -> exit status."""
    parser = subparsers.add_parser(
        "data",
        help="make a tokenizer, prepare text as verified token shards, look into them",
        description="From raw text to verified token shards, and looking into them.",
    )
    add_data_commands(parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True))


def add_data_commands(subparsers: Commands, open_run: OpenRun | None = None) -> None:
    """Add the commands themselves: tokenizer, prepare, import, merge, verify, inspect, stats, decode, drop.

    Args:
        open_run: opens a training run by its path, for questions about its steps and samples.
    """
    _add_tokenizer(subparsers)
    _add_prepare(subparsers)
    _add_import(subparsers)
    _add_merge(subparsers)
    _add_verify(subparsers)
    _add_inspect(subparsers)
    _add_stats(subparsers)
    _add_decode(subparsers)
    _add_drop(subparsers)
    for parser in subparsers.choices.values():
        parser.set_defaults(open_run=open_run)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 when a check found problems, 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(prog="hope data", description="From raw text to verified token shards.")
    add_data_commands(parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True))
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.func(arguments))
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if not getattr(error, "is_user_error", False):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _add(subparsers: Commands, name: str, summary: str) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=EPILOGS[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(func=_command(name))
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    return parser


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        from data_pipeline import commands

        return int(getattr(commands, f"run_{name}")(arguments))

    return run


def byte_size(text: str) -> int:
    """A number of bytes, with K, M, G or T for powers of 1024."""
    number, factor = text.upper().removesuffix("B").removesuffix("I"), 1
    for power, letter in enumerate("KMGT", start=1):
        if number.endswith(letter):
            number, factor = number[:-1], 1024**power
    try:
        return int(float(number) * factor)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write e.g. 500000, 64K, 16M or 1.5G") from None


def slice_of(text: str) -> tuple[int, int]:
    """``i/n``: part i, from 0, of n."""
    index, _, count = text.partition("/")
    try:
        return int(index), int(count)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no slice; write i/n, e.g. 0/16 for the first of 16") from None


def _add_read_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reading")
    group.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="JSON field or parquet column with the text (text); meta.text is the field text of meta",
    )
    group.add_argument(
        "--follow-links", action="store_true", help="read links that lead out of a directory; loops are cut in any case"
    )
    group.add_argument(
        "--text-unit",
        choices=("file", "line", "chunk"),
        default="file",
        help="what one document of a plain text file is (file)",
    )
    group.add_argument(
        "--chunk-bytes",
        type=byte_size,
        default=1 << 16,
        metavar="SIZE",
        help="length of a chunk (64K), cut at line ends",
    )
    group.add_argument(
        "--max-document-bytes", type=byte_size, default=1 << 24, metavar="SIZE", help="reject longer documents (16M)"
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="gets train/ and heldout/")
    parser.add_argument(
        "--held-out", type=float, default=0.01, metavar="PART", help="part of the documents, by hash of the text (0.01)"
    )
    parser.add_argument("--shard-tokens", type=int, default=1 << 24, metavar="N", help="tokens per shard (16777216)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (all cores); does not change the result")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result")


def _add_tokenizer(subparsers: Commands) -> None:
    parser = _add(subparsers, "tokenizer", "train a SentencePiece tokenizer, or take an existing one")
    parser.add_argument("sources", nargs="*", metavar="SOURCE")
    parser.add_argument("--out", required=True, metavar="FILE", help="where the model goes")
    parser.add_argument("--vocab-size", type=int, default=32000, metavar="N", help="number of token ids (32000)")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="kind of model (bpe)")
    parser.add_argument(
        "--max-bytes", type=byte_size, default=1 << 28, metavar="SIZE", help="train on a sample of this size (256M)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample (0)")
    parser.add_argument("--existing", metavar="FILE", help="take this model or tokenizer.json instead of training one")
    _add_read_options(parser)


def _add_prepare(subparsers: Commands) -> None:
    parser = _add(subparsers, "prepare", "tokenize text into shards with a manifest and a held-out split")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="text: see the list below")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="a SentencePiece model, or a tokenizer.json")
    _add_output_options(parser)
    parser.add_argument("--slice", type=slice_of, default=(0, 1), metavar="I/N", help="prepare part I of N, from 0")
    _add_read_options(parser)
    group = parser.add_argument_group("filters (rejected documents are counted by reason)")
    group.add_argument("--min-chars", type=int, default=1, metavar="N", help="shortest document (1)")
    group.add_argument("--max-chars", type=int, metavar="N", help="longest document")
    group.add_argument(
        "--max-repeated-lines", type=float, default=1.0, metavar="PART", help="characters in repeated lines, e.g. 0.2"
    )
    group.add_argument(
        "--min-letters", type=float, default=0.0, metavar="PART", help="letters among characters, e.g. 0.5"
    )
    group.add_argument("--keep-duplicates", action="store_true", help="keep documents whose text occurred before")
    group.add_argument(
        "--near-duplicates", type=float, metavar="SIMILARITY", help="reject by MinHash from this similarity, e.g. 0.8"
    )


def _add_import(subparsers: Commands) -> None:
    parser = _add(
        subparsers, "import", "take tokens from Megatron's or GPT-NeoX's .bin/.idx files, without tokenizing again"
    )
    parser.add_argument(
        "prefixes", nargs="+", metavar="PREFIX", help="path without .bin and .idx, or of one of the two"
    )
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="the one that the ids are of")
    _add_output_options(parser)
    parser.add_argument("--deduplicate", action="store_true", help="leave out documents whose text occurred before")
    parser.add_argument(
        "--dry-run", action="store_true", help="read the indices, say what they hold, and write nothing"
    )


def _add_merge(subparsers: Commands) -> None:
    parser = _add(subparsers, "merge", "join the slices of an array into one data set")
    parser.add_argument("out", metavar="DIR", help="the --out of the slices")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result; the slices stay")


def _add_verify(subparsers: Commands) -> None:
    parser = _add(subparsers, "verify", "check every digest, tar and token id")
    _add_path(parser)
    parser.add_argument("--text", action="store_true", help="decode every document and compare the digest of its text")
    _add_tokenizer_option(parser)


def _add_inspect(subparsers: Commands) -> None:
    parser = _add(
        subparsers, "inspect", "show documents as text with their origin, or the documents of a training step"
    )
    parser.add_argument("path", metavar="PATH", help="a prepared directory, a split, a manifest; with --step a run")
    parser.add_argument("--document", type=int, metavar="N", help="first document to show (0)", default=0)
    parser.add_argument("--count", type=int, metavar="N", help="documents to show (3)", default=3)
    parser.add_argument("--chars", type=int, default=400, metavar="N", help="characters of each (400), 0 for all")
    parser.add_argument("--step", type=int, metavar="N", help="list the documents of this step of a run, from 1")
    _add_tokenizer_option(parser)


def _add_stats(subparsers: Commands) -> None:
    parser = _add(subparsers, "stats", "count documents and tokens, with a histogram of lengths")
    _add_path(parser)
    parser.add_argument("--png", metavar="FILE", help="draw the histogram")


def _add_decode(subparsers: Commands) -> None:
    parser = _add(subparsers, "decode", "print the exact text of a document, a training sample, or token ids")
    parser.add_argument(
        "path", nargs="?", metavar="PATH", help="a prepared split, or its manifest; with --sample a run"
    )
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--document", type=int, metavar="N", help="number of a document in the split")
    chosen.add_argument("--sample", type=int, metavar="N", help="number of a sample of a run, from 0")
    chosen.add_argument("--ids", type=int, nargs="+", metavar="ID", help="token ids")
    _add_tokenizer_option(parser)


def _add_drop(subparsers: Commands) -> None:
    parser = _add(subparsers, "drop", "write a manifest without some shards, to go on when they are lost")
    _add_path(parser)
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="names of shards to leave out")
    parser.add_argument(
        "--out", required=True, metavar="NAME", help="file name of the new manifest, beside the old one"
    )


def _add_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a prepared directory, one of its splits, or a manifest")


def _add_tokenizer_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", metavar="FILE", help="the model, if it is not beside the splits")


if __name__ == "__main__":
    sys.exit(main())
