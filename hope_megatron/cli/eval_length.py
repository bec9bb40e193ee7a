"""How far a model reads: loss, time and memories by position up to a million tokens, and needles by length and depth.

Examples:

    hope eval length runs/NAME                               64 times the training length of the held-out text
    hope eval length runs/NAME --tokens 1M --png length.png  K and M count 1,024 and 1,048,576
    hope eval length DIR --text books/*.txt --tokens 256K    an exported model on your text
    hope eval length runs/NAME --needles number --samples 16 one kind of needle, better counted
    hope eval length runs/NAME --needles none                the text alone

Text and haystacks are streamed: the state is carried on, and a model of memories alone needs the same bytes at any length. Needles
hide in the text that is read. Trained at one length, asked at longer ones: nothing is tuned here.
"""

from __future__ import annotations

import argparse
import re
import time
from typing import TYPE_CHECKING

from hope_megatron.checkpoint.errors import ModelReferenceError
from hope_megatron.cli.eval_output import add_output_arguments, check_output, write_output
from hope_megatron.cli.models import add_text_arguments, prepare_process
from hope_megatron.convert.open_model import OpenModel, open_model
from hope_megatron.suites.needle_questions import NEEDLES

if TYPE_CHECKING:
    import numpy as np

    from hope_megatron.eval.length import Stretch
    from hope_megatron.suites.needle_reach import Reach

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
_DEFAULT_TIMES = 64
_DEFAULT_KINDS = ("number", "multi-key", "last value", "multi-value")
NONE = "none"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_text_arguments(parser)
    parser.add_argument(
        "--tokens",
        type=_tokens,
        metavar="N",
        help="how far to read, and the longest haystack: 65536, 64K, 1M (default: 64 times the training length, or all there is)",
    )
    parser.add_argument(
        "--needles",
        nargs="+",
        default=list(_DEFAULT_KINDS),
        choices=[*NEEDLES, NONE],
        metavar="KIND",
        help=f"of {', '.join(NEEDLES)}; or {NONE} (default: {', '.join(_DEFAULT_KINDS)})",
    )
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="haystacks of each kind, length and depth")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws questions and places (default 0)")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Read, ask, print."""
    kinds = _kinds(args)
    prepare_process()
    from hope_megatron.eval.length import read_far
    from hope_megatron.eval.length_plot import plot_length
    from hope_megatron.suites.needle_reach import asked_lengths, haystack_tokens, needle_reach

    opened = open_model(args.model, args.tokenizer)
    check_output(args, opened)
    tokens = _text(args, opened)
    count = len(tokens) - 1
    lengths = asked_lengths(count) if kinds else ()
    asked = haystack_tokens(lengths, kinds, args.samples)
    print(
        f"{opened.name}: {count:,} tokens of text, {asked:,} of haystacks, trained on {opened.window_tokens:,}",
        flush=True,
    )
    clock = _Progress(count + asked)
    stretches = read_far(
        opened.model, tokens, opened.window_tokens, lambda s: clock.tell(s.stop - s.start, f"read to {s.stop:,}")
    )
    found = []
    for reach in needle_reach(
        opened.model, opened.tokenizer.encode, tokens, lengths, kinds=kinds, samples=args.samples, seed=args.seed
    ):
        found.append(reach)
        clock.tell(
            reach.length * args.samples * (2 if reach.depth is None else 1), f"{reach.kind} in {reach.length:,} tokens"
        )
    tables = _tables(stretches, found)
    print(f"\n{tables}")
    result = {
        "model": opened.name,
        "trained_tokens": opened.window_tokens,
        "samples": args.samples,
        "seed": args.seed,
        "text": [stretch.as_dict() for stretch in stretches],
        "needles": [reach.as_dict() for reach in found],
    }
    if args.png:
        title = f"{opened.title}: {count:,} tokens, trained on {opened.window_tokens:,}"
        plot_length(args.png, result["text"], result["needles"], opened.window_tokens, title)
    write_output(args, opened, result, tables, {f"eval/loss_to_{s.stop}": s.loss for s in stretches})
    return 0


def _tokens(text: str) -> int:
    match = re.fullmatch(r"(\d+)([kKmM]?)", text)
    count = int(match[1]) * _UNITS[match[2].lower()] if match else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens such as 65536, 64K or 1M")
    return count


def _kinds(args: argparse.Namespace) -> tuple[str, ...]:
    if NONE in args.needles and len(args.needles) > 1:
        raise ModelReferenceError(f"--needles {' '.join(args.needles)}: {NONE}, or kinds")
    if args.samples < 1:
        raise ModelReferenceError(f"--samples {args.samples} must be at least 1")
    return () if NONE in args.needles else tuple(dict.fromkeys(args.needles))


def _text(args: argparse.Namespace, opened: OpenModel) -> np.ndarray:
    """As many tokens as were asked for."""
    from hope_megatron.eval.heldout import heldout_tokens

    tokens = heldout_tokens(opened, args.text, args.data, args.tokens or _DEFAULT_TIMES * opened.window_tokens)
    if args.tokens and len(tokens) <= args.tokens:
        raise ModelReferenceError(
            f"--tokens {args.tokens}: the text has {len(tokens) - 1:,} tokens; ask for fewer, or give more with --text FILE..."
        )
    return tokens


class _Progress:
    """Says how far a command is, and how long it will still take at the speed so far."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.began = total, 0, time.monotonic()

    def tell(self, tokens: int, what: str) -> None:
        """So many tokens more are done."""
        from hope_megatron.runtime.formatting import duration_text, percent_text

        self.done += tokens
        left = (time.monotonic() - self.began) * (self.total / self.done - 1)
        print(f"{percent_text(self.done / self.total):>8}  {what}, {duration_text(left)} left", flush=True)


def _tables(stretches: list[Stretch], found: list[Reach]) -> str:
    from hope_megatron.eval.report import markdown_table
    from hope_megatron.runtime.formatting import bytes_text, seconds_text

    rows = []
    for stretch in stretches:
        most = max(stretch.drift, key=lambda name: stretch.drift[name], default=None)
        drift = "-" if most is None else f"{stretch.drift[most]:.3f} ({most})"
        timed = f"{seconds_text(stretch.seconds_per_token)}"
        rows.append(
            [f"{stretch.start:,} to {stretch.stop:,}", stretch.loss, timed, bytes_text(stretch.state_bytes), drift]
        )
    header = ["position in the text", "nats per token", "time per token", "state", "largest drift of a memory"]
    tables = [markdown_table(header, rows)]
    lengths = list(dict.fromkeys(reach.length for reach in found))
    columns = [f"{length:,} tokens" for length in lengths]
    for title, figure in (("answers right", "right"), ("nats gained", "nats_gained")):
        cells = {(r.kind, r.depth, r.length): getattr(r, figure) for r in found}
        names = dict.fromkeys((r.kind, r.depth) for r in found)
        rows = [[_named(*name), *(f"{cells[*name, length]:.3f}" for length in lengths)] for name in names]
        tables += [markdown_table([f"needle: {title}", *columns], rows)] if rows else []
    return "\n\n".join(tables)


def _named(kind: str, depth: float | None) -> str:
    return kind if depth is None else f"{kind} at {depth:.0%}"
