"""What serving costs: tokens drawn by clients, beside transformers' generate; time and bytes of a session by context length.

    python benchmarks/costs/serve.py                                  a new model of 4 layers, width 128
    python benchmarks/costs/serve.py --contexts 1024 1048576 --json out.json --png out.png

Times are CPU seconds of this process, which other processes on the machine change little; run it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from hope_megatron import HopeConfig, HopeForCausalLM
from hope_megatron.generation.sampling import SamplingOptions
from hope_megatron.serve.engine import Engine
from hope_megatron.serve.sessions import Session
from hope_megatron.serve.streams import Stream, StreamOptions

VOCAB = 4096


class Ids:
    """A tokenizer for a model that never learnt a text."""

    eos_id = 0

    def decode(self, ids: list[int]) -> str:
        """A letter a token."""
        return "a" * len(ids)


def run(
    engine: Engine, prompts: list[list[int]], max_tokens: int, caches: list[Any] | None = None
) -> tuple[float, list[Stream]]:
    """CPU seconds until all streams have ended, and the streams."""
    done: queue.Queue[Stream] = queue.Queue()
    options = StreamOptions(max_tokens, SamplingOptions(temperature=0), ignore_end=True)
    streams = [
        Stream(Ids(), ids, options, lambda piece: None, cache=cache, on_end=done.put)
        for ids, cache in zip(prompts, caches or [None] * len(prompts))
    ]
    started = time.process_time()
    engine.submit(*streams)
    for _ in streams:
        done.get()
    return time.process_time() - started, streams


def random_prompts(count: int, length: int) -> list[list[int]]:
    """Token ids."""
    return torch.randint(1, VOCAB, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


def throughput(model: HopeForCausalLM, clients: list[int], num_tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Tokens per CPU second, ours and transformers' generate on the same batch, one after the other."""
    rows = []
    for count in clients:
        prompts, ours, theirs = random_prompts(count, 32), [], []
        for _ in range(repeats):
            engine = Engine(model, max_batch=count)
            ours.append(count * num_tokens / run(engine, prompts, num_tokens)[0])
            engine.close()
            started = time.process_time()
            model.generate(torch.tensor(prompts), max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)
            theirs.append(count * num_tokens / (time.process_time() - started))
        rows.append({"clients": count, "serve": ours, "generate": theirs})
        print(
            f"{count:3d} clients: {statistics.median(ours):8.1f} tokens per CPU second; generate {statistics.median(theirs):8.1f}",
            flush=True,
        )
    return rows


def by_context(model: HopeForCausalLM, contexts: list[int], repeats: int) -> list[dict[str, Any]]:
    """One session that grows: after each length, CPU milliseconds per drawn token and bytes of the state."""
    engine, cache, pending, length, rows = Engine(model), None, [0], 0, []
    for context in contexts:
        _, (stream,) = run(engine, [[*pending, *random_prompts(1, context - length)[0]]], 0, [cache])
        cache, pending, length = stream.cache, stream.pending, context
        found = [1000 * run(engine, [pending], 32, [cache])[0] / 32 for _ in range(repeats)]
        rows.append({"context": context, "ms": found, "bytes": Session(cache).num_bytes})
        print(
            f"{context:9,d} tokens: {statistics.median(found):6.2f} ms per token, {rows[-1]['bytes']:,} bytes",
            flush=True,
        )
    engine.close()
    return rows


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Time per token and bytes over the length of the context."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    lengths = [row["context"] for row in rows]
    axes[0].plot(lengths, [statistics.median(row["ms"]) for row in rows], marker="o")
    axes[0].set(xscale="log", ylim=(0, None), xlabel="tokens read", ylabel="CPU ms per token")
    axes[1].plot(lengths, [row["bytes"] / 2**20 for row in rows], marker="o")
    axes[1].set(xscale="log", ylim=(0, None), xlabel="tokens read", ylabel="MiB of state")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 16384, 131072])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    sizes = {
        "hidden_size": args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 4,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    model = HopeForCausalLM(HopeConfig(vocab_size=VOCAB, **sizes)).eval()
    result = {
        "throughput": throughput(model, args.clients, args.tokens, args.repeats),
        "by_context": by_context(model, args.contexts, args.repeats),
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.png:
        draw(args.png, result["by_context"])


if __name__ == "__main__":
    main()
