"""How fast is the memory operator, and how much memory does it take?

    python benchmarks/costs/memory_op.py                        B1 L1024, 4 heads of 64, chunks 16 to 256
    python benchmarks/costs/memory_op.py --alone --lengths 1024 65536   cost per token against length, HOPE only, in turns
    python benchmarks/costs/memory_op.py --activations          bytes kept for backward against length (--png FILE)
    python benchmarks/costs/memory_op.py --processes 2          heads split over processes too, as tensor parallelism does it
    python benchmarks/costs/memory_op.py --device cuda --dtype bfloat16 --batch 8 --heads 16 --lengths 4096

Side by side in one run: the chunk form of HOPE (five memories), with and without recomputing, with W1 alone written
(`written_layers: output`), and on a CPU without its compiled kernel too; the token loop; softmax attention of the
same width (torch's scaled_dot_product_attention on given q, k, v); and titans-pytorch's NeuralMemory when it is
installed. That one updates one memory where HOPE updates five. By default it takes every inner gradient of a sequence
at the initial weights, so that no chunk sees what another wrote; with "sequential" (its batch_size set to the chunk)
gradients are taken at the chunk's first state, as HOPE's are. FLOPs are the closed form of
hope_megatron.config.accounting, which the test suite holds against PyTorch's counter: recomputing is not counted, and
what the compiled kernel skips above the diagonals of its tables is. The machine's rate is that of torch.bmm on
products of the operator's own size. Freed memory is kept for the next pass, as PyTorch keeps it on a GPU;
MALLOC_TRIM_THRESHOLD_=131072 in the environment leaves that to glibc, which gives it back.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import multiprocessing
import statistics
from collections.abc import Callable

from hope_megatron.testing.benchmark import keep_freed_memory, machine, print_table, seconds, spread, write_json

import torch  # isort: skip  (after common has set OpenMP's wait policy)
import torch.nn.functional as F
from torch import Tensor

from hope_megatron.config.accounting import memory_macs
from hope_megatron.config.model import CMSConfig, CMSLevelConfig, MemoryConfig, ModelConfig
from hope_megatron.ops.memory import Bank, MemoryParams, RateLogits, memory_chunked, memory_recurrent


def main() -> None:
    args = parse()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    results: dict = {"machine": machine(args.device), "shape": vars(args), "rows": []}
    if args.activations:
        results["activations"] = measure_activations(args)
        if args.png:
            plot_activations(results["activations"], args.png)
    elif args.alone:
        results["rows"] = measure_lengths(args, dtype)
        print_lengths(results["rows"])
    else:
        for length in args.lengths:
            for chunk in args.chunks if length == args.lengths[0] else [64]:
                results["rows"] += measure_operator(args, dtype, length, chunk)
                if args.processes > 1:
                    results["rows"].append(measure_processes(args, dtype, length, chunk))
            results["rows"] += measure_others(args, dtype, length)
        print_table(
            ["what", "L", "chunk", "fwd tok/s", "fwd+bwd tok/s", "GFLOP/s", "of bmm"],
            [
                [r["what"], r["length"], r["chunk"], r["forward"], r["both"], r.get("gflops", "-"), r.get("share", "-")]
                for r in results["rows"]
            ],
        )
        if args.png:
            plot_speed(results["rows"], args.png)
    write_json(args.json, results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024])
    parser.add_argument("--chunks", type=int, nargs="+", help="default: 16 32 64 128 256; with --alone one, 64")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64, help="head width d, and memory hidden width h")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="also N processes that share heads and threads"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="HOPE only, lengths in turns: for cost against length")
    parser.add_argument("--activations", action="store_true", help="measure memory instead of time")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--png", metavar="FILE", help="picture of the activations, or of tokens/s against length")
    args = parser.parse_args()
    args.chunks = args.chunks or ([64] if args.alone else [16, 32, 64, 128, 256])
    if args.alone and (len(args.chunks) > 1 or args.processes > 1 or args.png):
        parser.error("--alone takes one of --chunks, and neither --processes nor --png")
    if args.heads % args.processes or args.threads % args.processes:
        parser.error(f"--processes {args.processes} must divide --heads {args.heads} and --threads {args.threads}")
    if args.processes > 1 and args.device != "cpu":
        parser.error("--processes is for the CPU: processes on one GPU take turns")
    return args


def model_of(args: argparse.Namespace, chunk: int, **memory: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=128,
        num_layers=1,
        hidden_size=args.heads * args.width,
        num_heads=args.heads,
        memory=MemoryConfig(chunk_tokens=chunk, **memory),
        cms=CMSConfig(levels=(CMSLevelConfig(hidden_size=16),)),
    )


def inputs(args: argparse.Namespace, dtype: torch.dtype, length: int):
    B, H, d = args.batch, args.heads, args.width
    make = lambda *shape: torch.randn(*shape, device=args.device).to(dtype).requires_grad_()  # noqa: E731
    rates = RateLogits(make(B, length, H), (torch.randn(B, length, H, device=args.device) + 6).requires_grad_())
    return [make(B, length, H, d) for _ in range(3)], rates


def parameters(args: argparse.Namespace) -> MemoryParams:
    def bank(n: int, outputs: int) -> Bank:
        H, d = args.heads, args.width
        w_in = 3 / d**0.5 * torch.randn(H, n, d, d, device=args.device)
        return Bank(w_in.requires_grad_(), (0.02 * torch.randn(H, n, outputs, d, device=args.device)).requires_grad_())

    return MemoryParams(bank(1, args.width), bank(2, args.width), bank(2, 1))


def bmm_rate(args: argparse.Namespace, chunk: int, length: int, before: Callable = lambda: None) -> float:
    """FLOP/s of torch.bmm on [5 B H, C, d] x [5 B H, d, d] in float32, the precision of the operator."""
    n = 5 * args.batch * args.heads
    a = torch.randn(n, min(chunk, length), args.width, device=args.device)
    b = torch.randn(n, args.width, args.width, device=args.device)
    products = lambda: [torch.bmm(a, b) for _ in range(50)]  # noqa: E731
    times = seconds(products, repeats=args.repeats, device=args.device, warmup=2, before=before)
    return 50 * 2 * a.numel() * args.width / min(times)


def row(
    args,
    what: str,
    length: int,
    chunk,
    run: Callable[[], Tensor],
    leaves: list[Tensor],
    flops_per_token: float | None = None,
) -> dict:
    """Time forward alone (without a graph) and forward with backward."""

    def forward():
        with torch.no_grad():
            run()

    def both():
        for x in leaves:
            x.grad = None
        run().sum().backward()

    repeats = max(4, min(args.repeats, 65536 // length))
    tokens = args.batch * length
    fwd = seconds(forward, repeats=repeats, device=args.device)
    all_ = seconds(both, repeats=repeats, device=args.device)
    found = {"what": what, "length": length, "chunk": chunk, "forward": tokens / min(fwd), "both": tokens / min(all_)}
    found |= {"forward_s": spread(fwd), "both_s": spread(all_)}
    if flops_per_token:
        rate = 3 * flops_per_token * found["both"]
        found |= {"gflops": rate / 1e9, "share": rate / bmm_rate(args, chunk, length)}
    return found


def measure_operator(args, dtype, length: int, chunk: int) -> list[dict]:
    params = parameters(args)
    qkv, rates = inputs(args, dtype, length)
    leaves = [*qkv, rates.eta, rates.alpha, *(w for bank in params for w in bank)]

    def hope(what: str, recompute: bool = False, **memory: str) -> dict:
        model = model_of(args, chunk, **memory)
        rule, flops = model.memory.rule, 2 * args.heads * sum(memory_macs(model, length))
        compute = model.memory.compute
        run = lambda: memory_chunked(*qkv, rates, params, rule, compute=compute, recompute=recompute)[0]  # noqa: E731
        return row(args, what, length, chunk, run, leaves, flops)

    rows = [hope("HOPE"), hope("HOPE, recomputing", recompute=True)]
    rows.append(hope("HOPE, W1 alone written", written_layers="output"))
    if length == args.lengths[0]:
        rows.append(hope("HOPE, PyTorch's operators", kernel="torch"))
        rows.append(hope("HOPE, PyTorch's operators, W1 alone written", written_layers="output", kernel="torch"))
    return rows


def measure_lengths(args, dtype) -> list[dict]:
    """Forward and backward at every length, with and without recomputing, in turns: in each of --repeats rounds, each goes
    through as many tokens as the longest has, in whole passes. The machine's moods and the size of a sample are then the same
    for all."""
    chunk, longest = args.chunks[0], max(args.lengths)
    params, rule = parameters(args), model_of(args, chunk).memory.rule
    made = {length: inputs(args, dtype, length) for length in args.lengths}
    found: dict[tuple[int, bool], list[tuple[float, float]]] = {}
    for round_ in range(args.repeats + 1):
        for recompute in (False, True):
            for length, (qkv, rates) in made.items():
                run = lambda: memory_chunked(*qkv, rates, params, rule, recompute=recompute)[0]  # noqa: B023, E731
                leaves = [*qkv, rates.eta, rates.alpha, *(w for bank in params for w in bank)]
                passes = [forward_backward(args, run, leaves) for _ in range(longest // length)]
                if round_:  # the first one warms up
                    found.setdefault((length, recompute), []).append(tuple(map(sum, zip(*passes))))
    tokens = {length: args.batch * length * (longest // length) for length in args.lengths}
    return [
        {
            "what": "HOPE, recomputing" if recompute else "HOPE",
            "length": length,
            "chunk": chunk,
            "rates": [tokens[length] / (forward + backward) for forward, backward in times],
            "forward_s": spread([forward for forward, _ in times]),
            "backward_s": spread([backward for _, backward in times]),
        }
        for (length, recompute), times in found.items()
    ]


def forward_backward(args, run: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[float, float]:
    """Seconds of forward and of backward of one pass."""
    for x in leaves:
        x.grad = None
    outputs: list[Tensor] = []
    forward = seconds(lambda: outputs.append(run()), repeats=1, warmup=0, device=args.device)
    backward = seconds(lambda: outputs.pop().sum().backward(), repeats=1, warmup=0, device=args.device)
    return forward[0], backward[0]


def print_lengths(rows: list[dict]) -> None:
    """The table of `measure_lengths`."""
    plain = {r["length"]: r["backward_s"]["median"] for r in rows if r["what"] == "HOPE"}
    print_table(
        ["what", "L", "chunk", "fwd+bwd tok/s, median", "slowest", "fastest", "backward, of no recomputing"],
        [
            [r["what"], r["length"], r["chunk"], statistics.median(r["rates"]), min(r["rates"]), max(r["rates"])]
            + [r["backward_s"]["median"] / plain[r["length"]]]
            for r in rows
        ],
    )


def measure_processes(args, dtype, length: int, chunk: int) -> dict:
    """HOPE with its heads and threads split over processes. Nothing inside the operator crosses heads; a run takes as long
    as its slowest process. torch.bmm is measured in the same processes at the same time."""
    context, share = multiprocessing.get_context("spawn"), copy.copy(args)
    share.heads, share.threads = args.heads // args.processes, args.threads // args.processes
    barrier, found = context.Barrier(args.processes), context.Queue()
    workers = [
        context.Process(target=_share, args=(share, dtype, length, chunk, barrier, found))
        for _ in range(args.processes)
    ]
    for worker in workers:
        worker.start()
    forward, both, rates = zip(*(found.get() for _ in workers))
    for worker in workers:
        worker.join()
    slowest = [[max(times) for times in zip(*of_all)] for of_all in (forward, both)]
    tokens, flops = args.batch * length, 2 * args.heads * sum(memory_macs(model_of(args, chunk), length))
    fwd, all_ = (tokens / min(times) for times in slowest)
    return {
        "what": f"HOPE, {args.processes} processes",
        "length": length,
        "chunk": chunk,
        "forward": fwd,
        "both": all_,
        "forward_s": spread(slowest[0]),
        "both_s": spread(slowest[1]),
        "gflops": 3 * flops * all_ / 1e9,
        "share": 3 * flops * all_ / sum(rates),
    }


def _share(args, dtype, length: int, chunk: int, barrier, found) -> None:
    """One process of `measure_processes`."""
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    params, rule = parameters(args), model_of(args, chunk).memory.rule
    qkv, rates = inputs(args, dtype, length)
    run = lambda: memory_chunked(*qkv, rates, params, rule)[0]  # noqa: E731
    repeats = max(2, min(args.repeats, 65536 // length))
    with torch.no_grad():
        forward = seconds(run, repeats=repeats, before=barrier.wait)
    both = seconds(lambda: run().sum().backward(), repeats=repeats, before=barrier.wait)
    found.put((forward, both, bmm_rate(args, chunk, length, barrier.wait)))


def measure_others(args, dtype, length: int) -> list[dict]:
    qkv, rates = inputs(args, dtype, length)
    rows = []
    if length <= 1024:
        params, rule, short = parameters(args), model_of(args, 64).memory.rule, min(length, 128)
        cut = [x[:, :short].detach().requires_grad_() for x in qkv]
        cut_rates = RateLogits(*(None if r is None else r[:, :short].detach() for r in rates))
        rows.append(row(args, "token loop", short, 64, lambda: memory_recurrent(*cut, cut_rates, params, rule)[0], cut))
    heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in qkv]
    rows.append(
        row(
            args,
            "softmax attention",
            length,
            "-",
            lambda: F.scaled_dot_product_attention(*heads_first, is_causal=True),
            heads_first,
        )
    )
    if length == args.lengths[0] and importlib.util.find_spec("titans_pytorch"):
        for expansion in (1.0, 4.0):
            rows += [titans_row(args, length, 64, expansion, sequential) for sequential in (True, False)]
    return rows


def titans_row(args, length: int, chunk: int, expansion: float, sequential: bool) -> dict:
    """One memory with its projections, as published on PyPI. expansion: hidden width over head width; 4 is its default."""
    from titans_pytorch import MemoryMLP, NeuralMemory

    dim = args.heads * args.width
    memory = NeuralMemory(
        dim,
        chunk_size=chunk,
        heads=args.heads,
        dim_head=args.width,
        batch_size=chunk if sequential else None,
        model=MemoryMLP(args.width, depth=2, expansion_factor=expansion),
    )
    memory = memory.to(args.device)
    x = torch.randn(args.batch, length, dim, device=args.device, requires_grad=True)
    what = f"titans-pytorch, h = {expansion:g} d{', sequential' * sequential}"
    return row(args, what, length, chunk, lambda: memory(x)[0], [x, *memory.parameters()])


def measure_activations(args) -> dict:
    """Bytes that autograd keeps between forward and backward, and what they are made of."""
    found = []
    for length in args.lengths:
        model, params = model_of(args, 64), parameters(args)
        qkv, rates = inputs(args, torch.float32, length)
        rule = model.memory.rule
        sizes = {}
        for name, recompute in (("plain", False), ("recomputing", True)):
            storages: dict[int, int] = {}

            def keep(x: Tensor, storages=storages) -> Tensor:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                y, _ = memory_chunked(*qkv, rates, params, rule, recompute=recompute)
            sizes[name] = sum(storages.values())
            del y
        io = 4 * sum(x.nbytes for x in qkv) // 3 + rates.eta.nbytes + rates.alpha.nbytes
        found.append({"length": length, "inputs_and_outputs": io, **sizes})
    print_table(
        ["L", "inputs + outputs MiB", "plain MiB", "recomputing MiB"],
        [
            [str(r["length"]), *(r[key] / 2**20 for key in ("inputs_and_outputs", "plain", "recomputing"))]
            for r in found
        ],
    )
    return found


def plot_activations(found: list[dict], path: str) -> None:
    """Bytes against length."""
    figure, axes = _axes("tokens", "MiB kept for backward", found)
    for key, name in (
        ("plain", "everything"),
        ("recomputing", "recomputing"),
        ("inputs_and_outputs", "inputs and outputs alone"),
    ):
        axes.plot([r["length"] for r in found], [r[key] / 2**20 for r in found], "o-", label=name)
    _save(figure, axes, path)


def plot_speed(rows: list[dict], path: str) -> None:
    """Forward and backward tokens/s against length, at a chunk of 64."""
    rows = [r for r in rows if r["chunk"] in (64, "-") and r["what"] != "token loop"]
    figure, axes = _axes("tokens", "tokens/s, forward + backward", rows)
    for what in dict.fromkeys(r["what"] for r in rows):
        points = [(r["length"], r["both"]) for r in rows if r["what"] == what]
        axes.plot(*zip(*points), "o-", label=what)
    _save(figure, axes, path)


def _axes(x_label: str, y_label: str, rows: list[dict]):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    lengths = sorted({r["length"] for r in rows})
    axes.set(xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
    axes.set_xticks(lengths, [f"{n // 1024}K" if n >= 1024 else str(n) for n in lengths])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure, axes, path: str) -> None:
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
