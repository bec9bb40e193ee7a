"""What serving costs: tokens drawn by clients, beside transformers' generate; time and bytes of a session by context length.

    python benchmarks/costs/serve.py                                  a new model of 4 layers, width 128
    python benchmarks/costs/serve.py --contexts 1024 1048576 --json out.json --png out.png

The engine alone, the whole server over HTTP (its clients are threads of this process) and generate take turns. Both wall time
and CPU seconds of this process are noted, and the machine's load; CPU seconds change little with other processes. Run it with
OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import queue
import socket
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import uvicorn

from hope_megatron import HopeConfig, HopeForCausalLM
from hope_megatron.generation.sampling import SamplingOptions
from hope_megatron.serve.app import build_app
from hope_megatron.serve.engine import Engine
from hope_megatron.serve.service import Service
from hope_megatron.serve.sessions import Session
from hope_megatron.serve.settings import Settings
from hope_megatron.serve.streams import Stream, StreamOptions

VOCAB = 4096


class Ids:
    """A tokenizer for a model that never learnt a text."""

    eos_id, vocab_size = 0, VOCAB

    def decode(self, ids: list[int]) -> str:
        """A letter a token."""
        return "a" * len(ids)


def clocks(work: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    """Wall and CPU seconds that it takes, and what it gives."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return (time.perf_counter() - wall, time.process_time() - cpu), result


def run(engine: Engine, prompts: list[list[int]], max_tokens: int, caches: list[Any] | None = None) -> list[Stream]:
    """Streams until all have ended. With caches they keep their states."""
    done: queue.Queue[Stream] = queue.Queue()
    options = StreamOptions(max_tokens, SamplingOptions(temperature=0), ignore_end=True)
    streams = [
        Stream(Ids(), ids, options, lambda piece: None, cache=cache, on_end=done.put, keep_state=caches is not None)
        for ids, cache in zip(prompts, caches or [None] * len(prompts))
    ]
    engine.submit(*streams)
    for _ in streams:
        done.get()
    return streams


@contextlib.contextmanager
def served(model: HopeForCausalLM, max_batch: int) -> Iterator[str]:
    """The address of a server in this process."""
    run = SimpleNamespace(reference="new", device=torch.device("cpu"), tokenizer=Ids(), model=model)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = build_app(Service(run, Settings(max_batch=max_batch)))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}/v1/completions"
    server.should_exit = True
    thread.join()


def ask(url: str, prompts: list[list[int]], max_tokens: int) -> None:
    """A client for each prompt, all at once."""

    def one(prompt: list[int]) -> None:
        # the server puts an end mark in front
        body = {"prompt": prompt[1:], "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == max_tokens

    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(one, prompts))


def random_prompts(count: int, length: int) -> list[list[int]]:
    """Token ids."""
    return torch.randint(1, VOCAB, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


def throughput(model: HopeForCausalLM, clients: list[int], num_tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Tokens per second of three ways to draw the same, which take turns."""
    rows = []
    for count in clients:
        prompts = random_prompts(count, 32)
        batch, fixed = torch.tensor(prompts), {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
        with served(model, count) as url:
            engine = Engine(model, max_batch=count)
            ways: dict[str, Callable[[], Any]] = {
                "engine": lambda: run(engine, prompts, num_tokens),  # noqa: B023 - called in this round
                "http": lambda: ask(url, prompts, num_tokens),  # noqa: B023
                "generate": lambda: model.generate(batch, do_sample=False, **fixed),  # noqa: B023
            }
            for way in ways.values():
                way()  # what happens once is not counted
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for _ in range(repeats):
                for name, way in ways.items():
                    found[name].append(clocks(way)[0])
            engine.close()
        row: dict[str, Any] = {"clients": count, "load": os.getloadavg()[0]}
        for name, seconds in found.items():
            row[name] = {
                clock: [count * num_tokens / pair[place] for pair in seconds]
                for place, clock in enumerate(("wall", "cpu"))
            }
            print(
                f"{count:3d} clients, {name:8s} tokens per second: wall {spread(row[name]['wall'])}, CPU {spread(row[name]['cpu'])}"
            )
        print(f"    load {row['load']:.0f}", flush=True)
        rows.append(row)
    return rows


def spread(values: list[float], digits: int = 0) -> str:
    """Median (smallest to largest)."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def by_context(model: HopeForCausalLM, contexts: list[int], repeats: int) -> list[dict[str, Any]]:
    """One session that grows: after each length, milliseconds per drawn token and bytes of the state."""
    engine, cache, pending, length, rows = Engine(model), None, [0], 0, []
    for context in contexts:
        (stream,) = run(engine, [[*pending, *random_prompts(1, context - length)[0]]], 0, [cache])
        cache, pending, length = stream.cache, stream.pending, context
        found = [clocks(lambda: run(engine, [pending], 32, [cache]))[0] for _ in range(repeats)]  # noqa: B023
        row: dict[str, Any] = {"context": context, "bytes": Session(cache).num_bytes, "load": os.getloadavg()[0]}
        row["wall_ms"], row["ms"] = ([1000 * pair[place] / 32 for pair in found] for place in (0, 1))
        rows.append(row)
        print(
            f"{context:9,d} tokens: ms per token: wall {spread(row['wall_ms'], 1)}, CPU {spread(row['ms'], 1)}, "
            f"{row['bytes']:,} bytes, load {row['load']:.0f}",
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
