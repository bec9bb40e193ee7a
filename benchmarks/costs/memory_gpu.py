"""What do the memories cost on a GPU, by Triton kernels, by PyTorch, and beside other mixers?

    python benchmarks/costs/memory_gpu.py --json gpu.json                 on a GPU: measured
    python benchmarks/costs/memory_gpu.py --estimate KERNELS.json         without one: estimated from compiled code
    python benchmarks/costs/memory_gpu.py --batches 1 8 --lengths 4096 --profile

Measured, at hope_760m's shape of a layer (24 heads of 64, chunks of 64): forward, and forward and backward with recomputation,
of `hope` and `hope_w1` by Triton (bf16 and fp32), by the phases in PyTorch, by those under torch.compile, by Triton replayed as a
CUDA graph; softmax attention; flash-linear-attention's gated delta rule and titans-pytorch where they are installed. TFLOP/s count
the closed form of hope_megatron.config.accounting without recomputation; the share is of 989 TFLOP/s (H100, dense bf16). --profile
adds the time of every kernel. Estimated: --estimate takes what benchmarks/costs/memory_kernels.py --json wrote.

**The measuring half has not been run on a GPU: none was at hand.**
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hope_megatron.testing.benchmark import machine, print_table, write_json

import torch  # isort: skip  (after benchmark has set OpenMP's wait policy)
import torch.nn.functional as F
from memory_kernels import MODELS

from hope_megatron.ops.memory import Bank, MemoryCompute, MemoryParams, RateLogits, memory_chunked

HEADS, WIDTH, LAYERS, DEVICE = 24, 64, 24, "cuda"
PEAK_TFLOPS = 989.0
GOALS = {("hope", 1): 50_000, ("hope", 8): 140_000, ("hope_w1", 1): 85_000, ("hope_w1", 8): 230_000}
"""Tokens/s of the inner memories of 24 layers. The outer products alone take 86,000."""


def main() -> int:
    args = parse()
    if args.estimate is None and not torch.cuda.is_available():
        print(
            "there is no CUDA device here: give --estimate KERNELS.json (from benchmarks/costs/memory_kernels.py --json)"
        )
        return 2
    if args.estimate is not None:
        results: dict[str, Any] = {"estimated": True, "rows": estimated(args)}
    else:
        results = {"machine": machine("cuda"), "rows": measured(args)}
    if args.json:
        write_json(args.json, results)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--models", nargs="+", default=["hope", "hope_w1"], choices=["hope", "hope_w1"])
    parser.add_argument("--estimate", type=Path, metavar="KERNELS.json")
    parser.add_argument(
        "--recompute", default="layer", choices=["layer", "memory"], help="estimate: training.recompute"
    )
    parser.add_argument("--profile", action="store_true", help="the time of every kernel, too")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


def estimated(args: argparse.Namespace) -> list[dict[str, Any]]:
    from memory_estimate import ASSUMED, layer_seconds

    kernels = [
        row
        for row in json.loads(args.estimate.read_text())["rows"]
        if row["target"] == "sm_90" and row["precision"] == "bf16_ptx"
    ]
    rows, table = [], []
    for model in args.models:
        for batch in args.batches:
            for T in args.lengths:
                parts = layer_seconds(model, kernels, batch=batch, T=T, heads=HEADS, recompute=args.recompute)
                seconds = sum(part["seconds"] for part in parts)
                rate, goal = batch * T / (LAYERS * seconds), GOALS.get((model, batch), "") if T == 4096 else ""
                rows.append(
                    {"model": model, "batch": batch, "T": T, "seconds": seconds, "tokens_per_s": rate, "parts": parts}
                )
                most = ", ".join(f"{p['kernel']} {p['seconds'] / seconds:.0%} ({p['limit']})" for p in parts[:3])
                table.append(
                    [model, batch, T, f"{1e3 * seconds:.1f}", f"{rate:,.0f}", f"{goal:,}" if goal else "", most]
                )
    print(f"ESTIMATED, nothing ran: {ASSUMED}")
    print_table(["model", "B", "T", "ms a layer", "tokens/s, 24 layers", "goal", "most of it"], table)
    return rows


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for T in args.lengths:
        for batch in args.batches:
            for name, flops, step in candidates(args, batch, T):
                try:
                    row = measure(step) | {"flops": flops}
                except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
                    torch.cuda.empty_cache()
                    row = {"error": str(error).splitlines()[0][:200]}
                rows.append({"what": name, "batch": batch, "T": T} | row)
                if args.profile and "error" not in row:
                    rows[-1]["kernels"] = profiled(step)
    table = []
    for row in rows:
        if "error" in row:
            table.append([row["what"], row["batch"], row["T"], row["error"], "", "", ""])
            continue
        rate = row["flops"] / row["both_s"] / 1e12
        tokens = row["batch"] * row["T"] / (LAYERS * row["both_s"])
        figures = [
            f"{1e3 * row['forward_s']:.2f}",
            f"{1e3 * row['both_s']:.2f}",
            f"{rate:.1f} ({rate / PEAK_TFLOPS:.1%})",
        ]
        table.append([row["what"], row["batch"], row["T"], *figures, f"{tokens:,.0f}"])
    print_table(
        ["what", "B", "T", "forward ms", "forward + backward ms", "TFLOP/s (of peak)", "tokens/s, 24 layers"], table
    )
    return rows


Step = Callable[[bool], None]


def candidates(args: argparse.Namespace, batch: int, T: int):
    """(name, FLOPs of forward and backward, step(backward)) of everything that is there."""
    from hope_megatron.config.accounting import memory_macs
    from hope_megatron.config.model import CMSConfig, CMSLevelConfig, MemoryConfig, ModelConfig

    for model in args.models:
        rule = MODELS[model]
        config = ModelConfig(
            vocab_size=128, num_layers=1, hidden_size=HEADS * WIDTH, num_heads=HEADS,
            memory=MemoryConfig(chunk_tokens=rule.chunk_tokens, written_layers=rule.written_layers),
            cms=CMSConfig(levels=(CMSLevelConfig(hidden_size=16),)),
        )  # fmt: skip
        flops = 6.0 * sum(memory_macs(config, T)) * HEADS * batch * T
        for kernel, precision in (("triton", "bf16"), ("triton", "fp32"), ("phases", "bf16"), ("phases", "fp32")):
            compute = MemoryCompute(kernel=kernel, precision=precision)
            yield f"{model}, {kernel}, {precision}", flops, memory_step(rule, compute, batch, T)
        compute = MemoryCompute(kernel="phases")
        yield f"{model}, phases, torch.compile", flops, memory_step(rule, compute, batch, T, compiled=True)
        graphed = memory_step(rule, MemoryCompute(kernel="triton", precision="bf16"), batch, T, graph=True)
        yield f"{model}, triton, bf16, CUDA graph", flops, graphed
    yield "softmax attention", 6.0 * batch * T * T * HEADS * WIDTH, attention_step(batch, T)
    if importlib.util.find_spec("fla"):
        yield "fla gated delta rule", 0.0, fla_step(batch, T)
    if importlib.util.find_spec("titans_pytorch"):
        yield "titans-pytorch", 0.0, titans_step(batch, T)


def memory_step(rule, compute, batch: int, T: int, *, compiled: bool = False, graph: bool = False) -> Step:
    new = lambda *shape, scale=1.0: (scale * torch.randn(*shape, device=DEVICE)).requires_grad_()  # noqa: E731
    bank = lambda n, o: Bank(new(HEADS, n, WIDTH, WIDTH, scale=0.2), new(HEADS, n, o, WIDTH, scale=0.06))  # noqa: E731
    params = MemoryParams(bank(1, WIDTH), bank(2, WIDTH), bank(2, 1))
    x, logits = [new(batch, T, HEADS, WIDTH) for _ in range(3)], RateLogits(*(new(batch, T, HEADS) for _ in range(2)))
    leaves, weight = (
        [*x, *logits[:2], *(w for b in params for w in b)],
        torch.randn(batch, T, HEADS, WIDTH, device=DEVICE),
    )
    call = torch.compile(memory_chunked) if compiled else memory_chunked

    def step(backward: bool) -> None:
        y = call(*x, logits, params, rule, compute=compute, recompute=True)[0]
        if backward:
            torch.autograd.grad(y, leaves, weight)

    return _graphed(step) if graph else step


def _graphed(step: Step) -> Step:
    graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    def replay(backward: bool) -> None:
        if backward not in graphs:
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for _ in range(3):
                    step(backward)
            torch.cuda.synchronize()
            graphs[backward] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[backward]):
                step(backward)
        graphs[backward].replay()

    return replay


def attention_step(batch: int, T: int) -> Step:
    qkv = [torch.randn(batch, HEADS, T, WIDTH, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]

    def step(backward: bool) -> None:
        y = F.scaled_dot_product_attention(*qkv, is_causal=True)
        if backward:
            y.sum().backward()

    return step


def fla_step(batch: int, T: int) -> Step:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    new = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)  # noqa: E731
    q, v = (new(batch, T, HEADS, WIDTH).requires_grad_() for _ in range(2))
    k = F.normalize(new(batch, T, HEADS, WIDTH), dim=-1).detach().requires_grad_()
    beta, g = new(batch, T, HEADS).sigmoid().requires_grad_(), F.logsigmoid(new(batch, T, HEADS)).requires_grad_()

    def step(backward: bool) -> None:
        y = chunk_gated_delta_rule(q, k, v, g, beta)[0]
        if backward:
            y.sum().backward()

    return step


def titans_step(batch: int, T: int) -> Step:
    from titans_pytorch import NeuralMemory

    memory = NeuralMemory(dim=HEADS * WIDTH, chunk_size=64, heads=HEADS, dim_head=WIDTH).to(DEVICE)
    x = torch.randn(batch, T, HEADS * WIDTH, device=DEVICE)

    def step(backward: bool) -> None:
        y = memory(x)[0]
        if backward:
            y.sum().backward()

    return step


def measure(step: Step, repeats: int = 10) -> dict[str, float]:
    """Median seconds, after three runs."""
    found = {}
    for name, backward in (("forward_s", False), ("both_s", True)):
        for _ in range(3):
            step(backward)
        times = []
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            step(backward)
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        found[name] = sorted(times)[repeats // 2]
    return found


def profiled(step: Step) -> dict[str, float]:
    """Seconds of every kernel in one forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(True)
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / 1e6 for event in profile.key_averages()}


if __name__ == "__main__":
    sys.exit(main())
