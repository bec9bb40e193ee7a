"""Do the inner steps overshoot? The eigenvalue that decides it, while the outer loop trains.

    python benchmarks/experiments/memory_curvature.py    TTT-MLP without bounded steps, until it is not finite
    python benchmarks/experiments/memory_curvature.py --normalize true --every 50 --png curvature.png

TTT-MLP of the size of hope_tiny on bytes of the Python standard library, as in memory_stability.py. Within a chunk one inner
step takes the errors e to about (I - A) e, where A is the product of the tokens' rates and the Gram matrix of their gradients. An
eigenvalue of A above 2 makes errors grow from chunk to chunk (gradient descent's limit). Printed every 25 steps for the head
where it is largest: the eigenvalue at the learned initial weights, the mean error in the first and the last chunk, and the
largest eigenvalue along the sequence.
"""

from __future__ import annotations

import argparse
import math
from typing import Any, NamedTuple

from learning import Trainer, small_model, start

from hope_megatron.testing.benchmark import machine, write_json  # before torch: sets OpenMP's wait policy

import torch  # isort: skip
from memory_stability import batch, corpus
from torch import Tensor

from hope_megatron.layers.memory_mixer import MemoryMixer
from hope_megatron.ops.memory import memory_chunked
from hope_megatron.ops.memory.inner import dsilu, features, output_error, squared_norm, step_scale, unit
from hope_megatron.ops.memory.rule import MemoryRule
from hope_megatron.ops.memory.types import MemoryParams, MemoryState, RateLogits, initial_state

POWER_ITERATIONS = 50
LIMIT = 2.0


class Chunk(NamedTuple):
    """One chunk of one sequence, every entry by head [H]."""

    eigenvalue: Tensor  # of A
    error: Tensor  # mean |e| before the step
    features: Tensor  # largest |phi|^2, what W2's gradients add to the curvature
    slope: Tensor  # largest |g_in|^2 / |e|^2, what W1's add
    weights: Tensor  # |W2|


def main() -> None:
    args = parse()
    start(args.threads)
    config = small_model("ttt_mlp", ["vocab_size=256", f"memory.normalize_steps={args.normalize}"])
    rows = run(args, Trainer(args, config, args.seed))
    write_json(args.json, {"machine": machine(), "arguments": vars(args), "rows": rows})
    if args.png:
        plot(rows, args.png)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--normalize", choices=["true", "false"], default="false", help="memory.normalize_steps")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=25, help="steps between looks (default: 25)")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--warmup", type=int, default=20, help="steps of linear warm-up (default: 20)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="every figure of every look")
    parser.add_argument("--png", metavar="FILE", help="the eigenvalue of every layer over steps")
    parser.set_defaults(optimizer="adamw")  # what Trainer reads
    return parser.parse_args()


def run(args: argparse.Namespace, trainer: Trainer) -> list[dict[str, Any]]:
    """Train; one row per look. Ends at the first value that is not finite, with what its chunks were like."""
    data, rows = corpus(), []
    generator = torch.Generator().manual_seed(args.seed)
    mixers = [module for module in trainer.model.modules() if isinstance(module, MemoryMixer)]
    for step in range(1, args.steps + 1):
        tokens = batch(data, args.batch, args.context, generator)
        given: list[tuple] = []
        for mixer in mixers:
            mixer.observer = lambda *inputs, given=given: given.append(inputs)
        loss = trainer.model(tokens[:, :-1], tokens[:, 1:].contiguous()).losses.mean()
        failed = not math.isfinite(loss.item())
        if failed or step % args.every == 0 or step == 1:
            seen = [chunks(*inputs[:6]) for inputs in given]
            rows.append({"step": step, "loss": loss.item(), "layers": [largest(layer) for layer in seen]})
            show(rows[-1])
        if failed:
            print(f"\nthe loss is not finite at step {step}; chunk by chunk, in the first layer that failed:")
            explain(next(layer for layer in seen if not torch.isfinite(layer[-1].error).all()))
            break
        if not math.isfinite(trainer.step(loss)):
            print(f"\nthe gradient is not finite at step {step}, the loss was")
            break
    return rows


@torch.no_grad()
def chunks(q: Tensor, k: Tensor, v: Tensor, logits: RateLogits, params: MemoryParams, rule: MemoryRule) -> list[Chunk]:
    """What the first sequence's chunks meet."""
    state = initial_state(params, 1, momentum=logits.theta is not None, dtype=torch.float32)
    found = []
    for start_token in range(0, q.size(1), rule.chunk_tokens):
        piece = slice(start_token, start_token + rule.chunk_tokens)
        inputs = [x[:1, piece] for x in (q, k, v)]
        rates = RateLogits(*(None if r is None else r[:1, piece] for r in logits))
        found.append(curvature(*inputs[1:], rates, rule, state))
        _, state = memory_chunked(*inputs, rates, params, rule, state)
    return found


def curvature(k: Tensor, v: Tensor, logits: RateLogits, rule: MemoryRule, state: MemoryState) -> Chunk:
    """A of one chunk, by power iteration. k, v: [1, C, H, d]."""
    bank = state.now.mem
    keys, values = (x.transpose(1, 2).unsqueeze(2) for x in (k, v))
    keys, values = unit(keys), unit(values) if rule.normalize_values else values
    phi, z = features(bank, keys)
    error = output_error(bank, keys, values, phi, rule, scalar=False)
    slopes = dsilu(z)
    delta = (error @ bank.w_out) * slopes
    rate = torch.full_like(error[..., :1], rule.eta_max)
    if logits.eta is not None:
        rate = rate * torch.sigmoid(logits.eta).transpose(1, 2)[:, :, None, :, None]
    if rule.normalize_steps:
        rate = rate * step_scale(phi, phi, delta, squared_norm(error))
    root = rate.sqrt()

    x = torch.randn(error.shape, generator=torch.Generator().manual_seed(0))
    for _ in range(POWER_ITERATIONS):
        x = root * x / x.norm(dim=(-1, -2), keepdim=True)
        back = (x @ bank.w_out) * slopes
        x = root * (phi @ (phi.mT @ x) + ((keys @ (keys.mT @ back)) * slopes) @ bank.w_out.mT)
    return Chunk(
        eigenvalue=x.norm(dim=(-1, -2))[0, :, 0],
        error=error.norm(dim=-1).flatten(2).mean(-1)[0],
        features=squared_norm(phi).flatten(2).amax(-1)[0],
        slope=(squared_norm(delta) / squared_norm(error)).flatten(2).amax(-1)[0],
        weights=bank.w_out.norm(dim=(-1, -2))[0, :, 0],
    )


def largest(layer: list[Chunk]) -> dict[str, Any]:
    """The head whose initial weights are nearest to overshooting."""
    head = int(layer[0].eigenvalue.argmax())
    return {
        "head": head,
        "initial": layer[0].eigenvalue[head].item(),
        "along": max(chunk.eigenvalue.nan_to_num(math.inf).max().item() for chunk in layer),
        "features": layer[0].features[head].item(),
        "slope": layer[0].slope[head].item(),
        "weights": layer[0].weights[head].item(),
        "errors": [chunk.error[head].item() for chunk in layer],
    }


def show(row: dict[str, Any]) -> None:
    number, worst = max(enumerate(row["layers"]), key=lambda layer: layer[1]["initial"])
    print(
        f"step {row['step']:4d}  loss {row['loss']:6.3f}  layer {number} head {worst['head']}: eigenvalue {worst['initial']:6.2f}"
        f" (|phi|^2 {worst['features']:.2f}, |g_in|^2/|e|^2 {worst['slope']:.2f}, |W2| {worst['weights']:.2f}),"
        f" error {worst['errors'][0]:.2f} -> {worst['errors'][-1]:.2f};"
        f"  largest along the sequence {max(layer['along'] for layer in row['layers']):.3g}",
        flush=True,
    )


def explain(layer: list[Chunk]) -> None:
    """Every chunk of the head that failed."""
    head = int(torch.isfinite(layer[-1].error).logical_not().int().argmax())
    print(
        f"| chunk of head {head} | eigenvalue | mean error | largest \\|phi\\|^2 | largest \\|g_in\\|^2/\\|e\\|^2 | \\|W2\\| |"
    )
    print("|---|---|---|---|---|---|")
    for number, chunk in enumerate(layer):
        print(f"| {number} | " + " | ".join(f"{value[head].item():.3g}" for value in chunk) + " |")


def plot(rows: list[dict[str, Any]], out: str) -> None:
    """The eigenvalue at the initial weights of every layer over outer steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    for layer in range(len(rows[0]["layers"])):
        axes.plot(steps, [row["layers"][layer]["initial"] for row in rows], ".-", label=f"layer {layer}")
    axes.axhline(LIMIT, color="black", linestyle=":", label="overshoots above")
    axes.set(xlabel="outer step", ylabel="largest eigenvalue of a chunk's inner step", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(out, dpi=110)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
