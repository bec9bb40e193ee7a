"""Does a family train whatever the learning rate? Loss spikes and non-finite values over a grid of a factor of 10.

    python benchmarks/experiments/memory_stability.py --json stability.json --png stability.png
    python benchmarks/experiments/memory_stability.py --families titans --lrs 1e-3 --steps 100
    python benchmarks/experiments/memory_stability.py --table --json stability.json --png stability.png    the rows again

Each cell trains a preset of the size of hope_tiny (4 layers of width 256, 4 heads) on bytes of the Python standard library. A
spike is a mean loss of 10 steps that lies more than 0.5 nats per byte above the smallest such mean before it. Cells of one rate
come one after another, the two ends of the grid first (the larger one leading), so that a part of the grid is a result too.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from typing import Any

from learning import Cells, Trainer, small_model, start, training_arguments

import torch  # isort: skip
import numpy as np
from torch import Tensor

FAMILIES = [
    "hope",
    "titans",
    "ttt_mlp",
    "ttt_linear",
    "deltanet",
    "gated_deltanet",
    "retnet",
    "linear_attention",
    "samba",
]
FAMILIES += ["hope_attention", "transformer_pp"]
SPIKE_STEPS, SPIKE_NATS = 10, 0.5


def main() -> None:
    args = parse()
    cells = Cells(args.json)
    if not args.table:
        start(args.threads)
        data = corpus()
        for lr in args.lrs:
            for family in args.families:
                cell = {"family": family, "optimizer": args.optimizer, "lr": lr, "steps": args.steps, "seed": args.seed}
                cell |= {"context": args.context, "batch": args.batch}
                if not cells.find(**cell):
                    cells.add(cell | train(args, family, lr, data))
    print_table(cells.rows)
    if args.png:
        plot(cells.rows, args.png)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=FAMILIES, metavar="NAME")
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-2, 1e-3, 3e-3], metavar="RATE")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--context", type=int, default=128, help="tokens per sequence (default: 128)")
    parser.add_argument("--batch", type=int, default=2, help="sequences per step (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="train nothing, show what --json holds")
    parser.add_argument("--png", metavar="FILE", help="training loss of every cell")
    training_arguments(parser)
    parser.set_defaults(optimizer="adamw")  # whose steps cost nothing beside a small model's
    return parser.parse_args()


def corpus() -> np.ndarray:
    """The Python standard library as bytes, document after document."""
    from data_pipeline.corpus import python_stdlib_documents

    return np.frombuffer(b"\n\n".join(d.data for d in python_stdlib_documents()), dtype=np.uint8)


def train(args: argparse.Namespace, family: str, lr: float, data: np.ndarray) -> dict[str, Any]:
    """One cell: losses and gradient norms of every step, until the end or the first value that is not finite."""
    config = small_model(family, ["vocab_size=256"])
    trainer = Trainer(argparse.Namespace(**vars(args) | {"lr": lr}), config, args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    losses, norms, started = [], [], time.process_time()
    for _ in range(args.steps):
        tokens = batch(data, args.batch, args.context, generator)
        loss = trainer.model(tokens[:, :-1], tokens[:, 1:].contiguous()).losses.mean()
        losses.append(loss.item())
        norms.append(trainer.step(loss))
        if not (math.isfinite(losses[-1]) and math.isfinite(norms[-1])):
            break
    finite = all(map(math.isfinite, losses + norms))
    return {
        "finite": finite,
        "failed_at": None if finite else len(losses),
        "spike": spike(losses),
        "final_loss": float(np.mean(losses[-50:])),
        "largest_norm": max(norms),
        "cpu_seconds": round(time.process_time() - started),
        "losses": [round(x, 4) for x in losses],
        "norms": [round(x, 3) for x in norms],
    }


def batch(data: np.ndarray, size: int, context: int, generator: torch.Generator) -> Tensor:
    """[size, context + 1] bytes from random places."""
    starts = torch.randint(len(data) - context - 1, (size,), generator=generator).tolist()
    return torch.from_numpy(np.stack([data[i : i + context + 1] for i in starts])).long()


def spike(losses: Sequence[float]) -> float:
    """The largest rise of the mean over 10 steps above the smallest such mean before it, nats."""
    if len(losses) < 2 * SPIKE_STEPS:
        return 0.0
    means = np.convolve(losses, np.full(SPIKE_STEPS, 1 / SPIKE_STEPS), "valid")
    return float(max(0.0, np.nanmax(means - np.minimum.accumulate(means))))


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line per family: loss of the last 50 steps at each rate, and the worst that happened."""
    lrs = sorted({row["lr"] for row in rows})
    print(
        "\n| family | "
        + " | ".join(f"loss at {lr:g}" for lr in lrs)
        + " | largest rise | largest gradient norm | verdict |"
    )
    print("|---" * (4 + len(lrs)) + "|")
    for family in dict.fromkeys(row["family"] for row in rows):
        group = {row["lr"]: row for row in rows if row["family"] == family}
        losses = [f"{group[lr]['final_loss']:.3f}" if lr in group else "–" for lr in lrs]
        rise, norm = (max(row[key] for row in group.values()) for key in ("spike", "largest_norm"))
        print(f"| {family} | {' | '.join(losses)} | {rise:.2f} | {norm:.1f} | {verdict(list(group.values()))} |")


def verdict(rows: list[dict[str, Any]]) -> str:
    """Stable, or where it was not."""
    failed = [f"not finite at step {row['failed_at']} (rate {row['lr']:g})" for row in rows if not row["finite"]]
    failed += [f"spike of {row['spike']:.2f} (rate {row['lr']:g})" for row in rows if row["spike"] > SPIKE_NATS]
    return ", ".join(failed) or "stable"


def plot(rows: list[dict[str, Any]], out: str) -> None:
    """Training loss over steps, one panel per family, one line per rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = list(dict.fromkeys(row["family"] for row in rows))
    lrs = sorted({row["lr"] for row in rows})
    figure = Figure(figsize=(12, 2.6 * math.ceil(len(families) / 4)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(math.ceil(len(families) / 4), 4, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, family in zip(panels, families):
        for row in (row for row in rows if row["family"] == family):
            smooth = np.convolve(row["losses"], np.full(SPIKE_STEPS, 1 / SPIKE_STEPS), "valid")
            colour = ("#4C78A8", "#54A24B", "#E4572E", "#B279A2")[lrs.index(row["lr"]) % 4]
            axes.plot(np.arange(len(smooth)) + SPIKE_STEPS, smooth, color=colour, label=f"rate {row['lr']:g}")
        axes.set_title(family, loc="left", fontsize=10)
    for axes in panels[len(families) :]:
        axes.set_axis_off()
    panels[0].set_ylim(1.5, 6)
    panels[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("step")
    figure.supylabel("training loss (nats per byte)")
    figure.savefig(out, dpi=110)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
