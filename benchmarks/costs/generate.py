"""How fast does text come, and how much does a stream hold, by length of the context?

    python benchmarks/costs/generate.py --json generate.json --png generate.png
    python benchmarks/costs/generate.py --models hope_60m transformer_pp_60m --contexts 1024 16384 65536 --device cuda

Each model (by default HOPE and a Transformer++ of the same size, whose state is a KV cache) reads one stream in chunk form up to
each context length, through the decoder that `hope generate` uses; the rate is that of the last stretch read. From there it
decodes tokens one by one, and goes on reading where it had stopped. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from hope_megatron.testing.benchmark import machine, print_table, spread, write_json

import torch  # isort: skip  (after common has set OpenMP's wait policy)

from hope_megatron.config.load import load_model_config
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.eval.report import save_figure
from hope_megatron.generation.decoder import Decoder
from hope_megatron.generation.sampling import SamplingOptions
from hope_megatron.model import build_model
from hope_megatron.parallel.distributed import init_distributed

GREEDY = SamplingOptions(temperature=0.0)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    device = init_distributed(ParallelConfig(), num_threads=args.threads).device
    rows = [row for name in args.models for row in measure(args, name, device)]
    print_table(
        ["model", "context", "prefill tok/s", "decode tok/s", "state MiB"],
        [[r["model"], r["context"], r["prefill"], r["decode"], r["state_bytes"] / 2**20] for r in rows],
    )
    write_json(args.json, {"machine": machine(device.type), "arguments": vars(args), "rows": rows})
    if args.png:
        draw(Path(args.png), rows, f"batch {args.batch}, {args.threads} threads" if device.type == "cpu" else "GPU")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["hope_tiny", "transformer_pp_tiny"], metavar="PRESET")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--tokens", type=int, default=64, help="decoded at each context, per repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--png", metavar="FILE")
    return parser.parse_args()


def measure(args: argparse.Namespace, name: str, device: torch.device) -> list[dict[str, Any]]:
    """Rates of one model at each context length."""
    config = load_model_config(name)
    model = build_model(config, seed=0).to(device).eval()
    generator = torch.Generator().manual_seed(0)
    decoder, rows = Decoder(model, args.batch), []
    feed = lambda count: torch.randint(config.vocab_size, (args.batch, count), generator=generator)  # noqa: E731
    decoder.append(feed(256))
    decode(decoder, 8, device)  # buffers and caches of both forms are made
    decoder, length = Decoder(model, args.batch), 0
    for context in sorted(args.contexts):
        decoder.append(feed(context - length))
        read_s = timed(decoder.read_ahead, device)
        times = [decode(decoder, args.tokens, device) for _ in range(args.repeats)]
        rows.append(
            {
                "model": config.name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "context": context,
                "prefill": args.batch * (context - length) / read_s,
                "decode": args.batch * args.tokens / min(times),
                "decode_s": spread(times),
                "state_bytes": decoder.state.num_bytes(),
            }
        )
        print(f"{config.name} at {context:,}: {rows[-1]['decode']:,.0f} tokens/s decoded", flush=True)
        length = context
    return rows


def timed(run, device: torch.device) -> float:
    """Wall time of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def decode(decoder: Decoder, count: int, device: torch.device) -> float:
    """Seconds for `count` greedy tokens, drawn from a copy of the stream: states are values and never change in place."""
    fork = Decoder(
        decoder.model, len(decoder.pending), state=decoder.state, pending=decoder.pending, seen=decoder.seen.clone()
    )
    rng = torch.Generator(device)
    return timed(lambda: list(fork.generate(count, GREEDY, rng)), device)


def draw(path: Path, rows: list[dict[str, Any]], where: str) -> None:
    """Decode and prefill rates and bytes of state against context length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(13, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [
        ("decode", "decoding, tokens/s", 1.0),
        ("prefill", "reading a prompt, tokens/s", 1.0),
        ("state_bytes", "state of a stream, MiB", 2**20),
    ]
    for number, (key, title, unit) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 3, number)
        for name, colour in zip(
            dict.fromkeys(row["model"] for row in rows), ("#0969da", "#8c959f", "#bf3989", "#1a7f37")
        ):
            mine = [row for row in rows if row["model"] == name]
            axes.plot([r["context"] for r in mine], [r[key] / unit for r in mine], "o-", color=colour, label=name, lw=2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        contexts = sorted({row["context"] for row in rows})
        axes.set_xticks(contexts, [f"{c // 1024}K" if c % 1024 == 0 else str(c) for c in contexts])
        axes.set_xlabel("context, tokens")
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        if number == 1:
            axes.legend(frameon=False)
    figure.suptitle(where, x=0.99, ha="right", fontsize=9, color="#8c959f")
    save_figure(figure, path)


if __name__ == "__main__":
    main()
