"""What a text does to a model's memories: writes, drift, rates, and which tokens surprised which memory.

Examples:

    hope eval memory runs/NAME                     the beginning of the run's held-out text
    hope eval memory runs/NAME --text FILE         a text of yours
    hope eval memory runs/NAME --max-tokens 8192   far beyond the training length
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hope_megatron.checkpoint.errors import ModelReferenceError
from hope_megatron.cli.models import add_text_arguments, prepare_process
from hope_megatron.cli.output_files import check_writable
from hope_megatron.convert.open_model import OpenModel, open_model

if TYPE_CHECKING:
    from hope_megatron.eval.memory_text import TextHealth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_text_arguments(parser)
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="read the first N tokens (default: twice the training length)"
    )
    parser.add_argument("--top", type=int, default=12, metavar="N", help="rows of the table of surprises (default 12)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: memory.json in the run's or model's directory"
    )
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="default: memory.png in the run's or model's directory"
    )


def run(args: argparse.Namespace) -> int:
    """Read the text, draw, print."""
    if args.top < 0 or (args.max_tokens is not None and args.max_tokens < 2):
        raise ModelReferenceError("--top must not be negative, and --max-tokens at least 2")
    check_writable(args.json, args.png)
    prepare_process()
    from hope_megatron.eval.heldout import heldout_tokens
    from hope_megatron.eval.memory_plot import plot_memory
    from hope_megatron.eval.memory_text import read_text
    from hope_megatron.runtime.files import write_json

    opened = open_model(args.model, args.tokenizer)
    json_file, png_file = args.json or opened.directory / "memory.json", args.png or opened.directory / "memory.png"
    check_writable(json_file, png_file)
    count = args.max_tokens or 2 * opened.window_tokens
    tokens = heldout_tokens(opened, args.text, args.data, count)[:count]
    health = read_text(opened.model, tokens, opened.window_tokens)
    print(f"{opened.name}: {len(tokens):,} tokens, trained on {opened.window_tokens:,}\n")
    print(_layer_table(health))
    if args.top:
        print(
            "\nsurprise, in standard deviations above each memory's mean over the text around, averaged over layers\n"
        )
        print(_surprise_table(health, opened, args.top))
    write_json(json_file, {"model": opened.name, "trained_tokens": opened.window_tokens, **health.as_dict()})
    title = f"{opened.title}: {len(tokens):,} tokens of {_source(args)}"
    plot_memory(png_file, health, title, lambda i: _shown(opened, health, i, before=0), opened.window_tokens)
    print(f"\nwritten: {png_file}, {json_file}")
    return 0


def _source(args: argparse.Namespace) -> str:
    return ", ".join(path.name for path in args.text) if args.text else str(args.data or "the held-out split")


def _layer_table(health: TextHealth) -> str:
    from hope_megatron.eval.report import markdown_table

    rows: list[list[object]] = []
    for layer in health.layers:
        for i, name in enumerate(layer.names):
            shared = [float(layer.eta.mean()), float(layer.retention.mean())] if i == 0 else [None, None]
            figures = [layer.update[i].mean(), layer.drift[i, -1], layer.surprise[i].mean()]
            rows.append([layer.layer, name, *map(float, figures), *shared])
    return markdown_table(
        ["layer", "memory", "change by a chunk", "drift at the end", "surprise", "eta", "alpha"], rows
    )


def _surprise_table(health: TextHealth, opened: OpenModel, count: int) -> str:
    from hope_megatron.eval.report import markdown_table

    surprise = health.surprise()
    rows = []
    for position in health.most_surprising(count):
        loss = None if position == 0 else f"{health.losses[position]:.2f}"
        scores = [f"{value:+.1f}" for value in surprise[:, position]]
        rows.append([position, _shown(opened, health, position, before=6), loss, *scores])
    return markdown_table(["position", "text", "loss", *health.names], rows)


def _shown(opened: OpenModel, health: TextHealth, position: int, before: int) -> str:
    """The token, after `before` others, on one line: ␣ for a space at its beginning, ⏎ for line breaks."""
    decode, tokens = opened.tokenizer.decode, health.tokens.tolist()
    if tokens[position] == opened.tokenizer.eos_id:
        return "(end of document)"
    start = max([0, position - before] + [i + 1 for i in range(position) if tokens[i] == opened.tokenizer.eos_id])
    start = max(start, position - before)
    head, whole = decode(tokens[start:position]), decode(tokens[start : position + 1])
    token = whole[len(head) :] if whole.startswith(head) else decode([tokens[position]])
    token = "␣" * (len(token) - len(token.lstrip(" "))) + token.lstrip(" ")
    shown = f"{head}[{token}]" if before else token
    return shown.replace("\n", "⏎").replace("\t", "→").replace("|", "¦")
