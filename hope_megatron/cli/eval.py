"""Held-out loss and perplexity of a model: per token, per byte, per word.

Examples:

    hope eval runs/NAME                         the run's held-out shards
    hope eval runs/NAME --baselines             beside unigram and bigram models of its training shards
    hope eval runs/NAME --context 32x           how far beyond the training length it extrapolates
    hope eval runs/NAME --stride 64             sliding rows: every token with a full context
    hope eval DIR --text FILE --context stream  an exported model on a text, state carried to its end
    hope eval runs/NAME --context stream --learn cms.levels.0.inner_chunk_tokens=64 cms.levels.0.inner_rate=0.01
                                                it goes on learning from what it reads

Other evaluations: hope eval memory, hope eval length, hope eval lm, hope eval suite.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hope_megatron.checkpoint.errors import ModelReferenceError
from hope_megatron.cli.eval_output import add_output_arguments, check_output, write_output
from hope_megatron.cli.learning import add_learning_arguments, prepare_learning
from hope_megatron.cli.models import add_text_arguments, prepare_process
from hope_megatron.config.training import data_location
from hope_megatron.convert.open_model import OpenModel, open_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_text_arguments(parser)
    parser.add_argument(
        "--context",
        metavar="TOKENS|Nx|stream",
        help="tokens read from the initial state before it starts anew (default: the sequence length in training; 32x: 32 "
        "times that); stream: never, each of --batch-size streams reads its part to the end",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="let the rows overlap: begin one every N tokens, score what is new in it",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows, or streams, at once (default 8)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="score only the first N tokens")
    parser.add_argument(
        "--baselines",
        nargs="?",
        const="",
        metavar="MANIFEST",
        help="also unigram and bigram, counted on the run's (or these) shards",
    )
    add_learning_arguments(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate."""
    prepare_process()
    from hope_megatron.eval.evaluate import evaluate
    from hope_megatron.eval.heldout import heldout_tokens

    opened = open_model(args.model, args.tokenizer)
    check_output(args, opened)
    learn = prepare_learning(args, opened.model)
    tokens = heldout_tokens(opened, args.text, args.data, args.max_tokens)
    context_tokens = _context_tokens(args.context, opened.window_tokens)
    manifest = _baseline_manifest(args, opened)
    result = evaluate(
        opened,
        tokens,
        context_tokens,
        batch_size=args.batch_size,
        baseline_manifest=manifest,
        stride_tokens=args.stride,
        learn=learn,
    )
    context = f"{context_tokens:,}" if context_tokens else "streamed"
    context += f", a row every {args.stride:,}" if args.stride else ""
    context += ", learning in context" if learn else ""
    print(
        f"{opened.name}: {result['tokens']:,} tokens, {result['tokens_per_second']:,.0f} tokens/s, context: {context}\n"
    )
    tables = _tables(result)
    print(tables)
    if args.png:
        _draw(args.png, result, opened)
    score = result["scores"]["model"]
    figures = ("loss", "perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity")
    write_output(args, opened, result, tables, {f"eval/{name}": score[name] for name in figures if score[name]})
    return 0


def _tables(result: dict[str, Any]) -> str:
    from hope_megatron.eval.report import markdown_table, score_table

    tables = score_table(result["scores"])
    positions = result["loss_by_position"]
    if len(positions) > 1:
        rows = [[f"{row['from']:,} to {row['to']:,}", row["loss"], row["tokens"]] for row in positions]
        tables += "\n\n" + markdown_table(["position in the context", "nats per token", "tokens"], rows)
    kinds = result["loss_by_kind"]
    if kinds:
        models = list(kinds[0]["loss"])
        rows = [[row["kind"], f"{row['share']:.1%}", *row["loss"].values()] for row in kinds]
        tables += "\n\n" + markdown_table(["the token completes or spells a", "of all", *models], rows)
    return tables


def _draw(path: Path, result: dict[str, Any], opened: OpenModel) -> None:
    """Loss by position where there are several ranges, else the models' losses as bars."""
    from hope_megatron.eval.report import plot_losses, plot_positions

    title = f"{opened.title}: {result['tokens']:,} tokens"
    if len(result["loss_by_position"]) > 1:
        plot_positions(path, result["loss_by_position"], opened.window_tokens, title)
    else:
        plot_losses(path, {name: score["loss"] for name, score in result["scores"].items()}, title)


def _context_tokens(text: str | None, default: int) -> int | None:
    if text is None:
        return default
    if text == "stream":
        return None
    number, times = (text[:-1], default) if text.endswith("x") else (text, 1)
    if not number.isdecimal() or int(number) < 1:
        raise ModelReferenceError(f"--context {text}: give a number of tokens, a multiple such as 32x, or stream")
    return int(number) * times


def _baseline_manifest(args: argparse.Namespace, opened: OpenModel) -> Path | str | None:
    if args.baselines is None:
        return None
    if args.baselines:
        return data_location(args.baselines)
    if opened.run is None:
        raise ModelReferenceError("an exported model does not name its training shards; give --baselines MANIFEST")
    return opened.run.data.train
