"""What learning in context costs per token against the static model, and that the cost does not grow with the length.

    python benchmarks/costs/in_context.py                                  hope_tiny, one stream of 16K tokens
    python benchmarks/costs/in_context.py --chunk 16 64 256 --batch 4      chunk lengths, several contexts at once
    python benchmarks/costs/in_context.py --model transformer_pp_tiny --set attention.window_tokens=256

Three ways of going through a stream: reading it (as `hope eval --context stream --learn`), writing it token by token (as
`hope generate --learn`), and training on it (forward and backward, no optimizer step). Static and learning models take turns piece
by piece. Reported: milliseconds of processor time per token (of all threads, so that a busy machine does not count), the ratio, the
last quarter of the stream over the first, and the size of the state.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from typing import Any

from hope_megatron.testing.benchmark import machine, print_table, write_json

import torch  # isort: skip  (after common has set OpenMP's wait policy)

from hope_megatron.config.load import load_model_config
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.generation.decoder import Decoder
from hope_megatron.generation.learning import LearningDecoder
from hope_megatron.model import LanguageModel, build_model
from hope_megatron.parallel.distributed import init_distributed


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    init_distributed(ParallelConfig(), num_threads=args.threads)
    rows = []
    for chunk in args.chunk:
        clocks = [f"cms.levels.0.inner_chunk_tokens={chunk}", f"cms.levels.0.inner_rate={args.rate}"]
        static, learning = (build_model(load_model_config(args.model, [*args.set, *x])) for x in ([], clocks))
        rows.append({"what": "read", "chunk": chunk} | read(args, static, learning, args.piece // chunk * chunk))
        rows.append({"what": "write", "chunk": chunk} | write(args, static, learning))
        rows.append({"what": "train", "chunk": chunk} | train(args, static, learning))
        print(*rows[-3:], sep="\n", flush=True)
    keys = ["what", "chunk", "static_ms", "learning_ms", "ratio", "last_over_first", "state_mib"]
    print_table(keys, [[row.get(key, "") for key in keys] for row in rows])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak resident memory {peak:.2f} GiB")
    write_json(args.json, {"machine": machine(), "arguments": vars(args), "peak_resident_gib": peak, "rows": rows})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hope_tiny", metavar="PRESET")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the preset")
    parser.add_argument("--chunk", type=int, nargs="+", default=[64], help="inner_chunk_tokens of the fastest level")
    parser.add_argument("--rate", type=float, default=1e-3, help="inner_rate")
    parser.add_argument("--length", type=int, default=16384, help="tokens of the stream that is read")
    parser.add_argument("--written", type=int, default=1024, help="tokens that are written")
    parser.add_argument("--train-length", type=int, default=1024, help="tokens per training sequence")
    parser.add_argument("--piece", type=int, default=1024, help="tokens per reading call")
    parser.add_argument("--batch", type=int, default=1, help="streams at once")
    parser.add_argument("--repeats", type=int, default=3, help="of the training pass")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


@torch.no_grad()
def read(args: argparse.Namespace, static: LanguageModel, learning: LanguageModel, piece: int) -> dict[str, Any]:
    """One stream from its beginning to its end, piece by piece."""
    models = [m.eval().requires_grad_(False) for m in (static, learning)]
    states: list[Any] = [None, None]
    times: list[list[float]] = [[], []]
    sizes = []
    for number in range(args.length // piece):
        x, y = tokens(args, piece, number)
        for i, model in enumerate(models):
            started = time.process_time()
            states[i] = model(x, y, states[i], learn=i == 1, return_state=True).state
            times[i].append(time.process_time() - started)
        sizes.append(states[1].num_bytes())
    assert len(set(sizes)) == 1 or "attention" in learning.model_config.mixers, "the state has grown"
    return summary(times, args.batch * piece, first=1) | {"tokens": args.length, "state_mib": sizes[-1] / 2**20}


@torch.no_grad()
def write(args: argparse.Namespace, static: LanguageModel, learning: LanguageModel) -> dict[str, Any]:
    """Token by token; timed per 64 tokens, so that every span has its share of steps."""
    decoders = [Decoder(static, args.batch), LearningDecoder(learning, args.batch)]
    times: list[list[float]] = [[], []]
    span = max(64, learning.model_config.cms.inner_segment_tokens)
    for number in range(args.written // span):
        x, _ = tokens(args, span, number)
        for decoder, spent in zip(decoders, times, strict=True):
            started = time.process_time()
            for token in x.split(1, 1):
                decoder.append(token)
                decoder.next_logits()
            spent.append(time.process_time() - started)
    return summary(times, args.batch * span, first=1) | {"tokens": args.written}


def train(args: argparse.Namespace, static: LanguageModel, learning: LanguageModel) -> dict[str, Any]:
    """Forward and backward of one micro-batch."""
    times: list[list[float]] = [[], []]
    for repeat in range(1 + args.repeats):
        x, y = tokens(args, args.train_length, repeat)
        for i, model in enumerate((static, learning)):
            model.train().requires_grad_(True)
            started = time.process_time()
            model(x, y, learn=i == 1).losses.mean().backward()
            times[i].append(time.process_time() - started)
            model.zero_grad(set_to_none=True)
    found = summary(times, args.batch * args.train_length, first=1)
    return {key: value for key, value in found.items() if key != "last_over_first"} | {"tokens": args.train_length}


def tokens(args: argparse.Namespace, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and their targets, [batch, count] each: time does not depend on what is read."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, (args.batch, count + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:].contiguous()


def summary(times: list[list[float]], num_tokens: int, first: int) -> dict[str, Any]:
    """Medians in ms per token without the first (warm-up) pieces, ratio by piece, and the last quarter over the first."""
    static, learning = ([1e3 * t / num_tokens for t in series[first:]] for series in times)
    quarter = max(1, len(learning) // 4)
    return {
        "static_ms": statistics.median(static),
        "learning_ms": statistics.median(learning),
        "ratio": statistics.median(b / a for a, b in zip(static, learning, strict=True)),
        "last_over_first": statistics.median(learning[-quarter:]) / statistics.median(learning[:quarter]),
        "series_ms": learning,
    }


if __name__ == "__main__":
    main()
