r"""Are the memories heard? Each block is trained beside the same block with its inner rates at 0.

    python benchmarks/experiments/memory_learning.py recall --families hope titans deltanet --steps 4000 --minutes 30
    python benchmarks/experiments/memory_learning.py recall --until 16 --steps 400 --variants default l2 external_targets
    hope data tokenizer python-stdlib --vocab-size 1024 --out data/tokenizer.model
    hope data prepare python-stdlib --tokenizer data/tokenizer.model --out data --held-out 0.05
    python benchmarks/experiments/memory_learning.py text --data data --seeds 3 --steps 400 --tokens 2048 --set chunk_tokens=64 \
        --json text.json --png text.png
    python benchmarks/experiments/memory_learning.py table --json recall.json           the rows again, as Markdown

`recall`: multi-query associative recall. A sequence tells key-value pairs, then asks for the value of every key in another
order. One model goes through growing tasks: the next one starts when this one is answered; the tasks of 8, 32 and 64 pairs, and
of 64 pairs in 1,024 tokens, count as solved at 99 % of 4,096 answers in unseen sequences. The control takes as many steps on
each task as its block did. One head of 128: 64 pairs need that many independent keys, which two heads of 64 do not have.

`text`: held-out loss by position in contexts of 1,024 tokens. Memories that are heard keep it falling where the silent
block's is flat.

--variants changes single settings of HOPE's memories (`VARIANTS`): how its defaults were chosen.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from learning import SILENT, Cells, Trainer, small_model, start, training_arguments

import torch  # isort: skip
from torch import Tensor

from hope_megatron.config import ModelConfig
from hope_megatron.model.loss import IGNORE

VARIANTS: dict[str, list[str]] = {
    "default": [],
    "l2": ["objective=l2"],  # eta_max follows: the largest stable one
    "dgd_input": ["dgd_layers=input"],
    "no_dgd": ["dgd_layers=none"],
    "chunk_start": ["read=chunk_start"],
    "read_skip": ["read_skip=true"],
    "full_target": ["dot_target=full"],
    "static": ["adaptive_key=false", "adaptive_value=false", "adaptive_eta=false", "adaptive_alpha=false"],
    "external_targets": ["own_targets=false"],
    "static_external": [
        "adaptive_key=false",
        "adaptive_value=false",
        "adaptive_eta=false",
        "adaptive_alpha=false",
        "own_targets=false",
    ],
    "momentum": ["momentum=data"],
    "no_decay": ["decay=none"],
    "decay_to_zero": ["decay_to=zero"],
    "eta_init_0.5": ["eta_init=0.5"],
    "eta_init_0.03": ["eta_init=0.03"],
    "alpha_init_0.99": ["alpha_init=0.99"],
    "alpha_init_0.9999": ["alpha_init=0.9999"],
    "input_scale_3": ["input_scale=3.0"],
    "output_gate": ["output_gate=silu"],
    "chunk_16": ["chunk_tokens=16"],
    "chunk_64": ["chunk_tokens=64"],
    "chunk_64_self_16": ["chunk_tokens=64", "self_chunk_tokens=16"],
    "chunk_16_self_64": ["chunk_tokens=16", "self_chunk_tokens=64"],
}
KEYS, VALUES, FILLERS = 96, 64, 16
FIRST_VALUE, FIRST_FILLER = 1 + KEYS, 1 + KEYS + VALUES
RECALL_VOCAB, TEXT_VOCAB = FIRST_FILLER + FILLERS, 1024


def main() -> None:
    args = parse()
    cells = Cells(args.json)
    if args.task != "table":
        start(args.threads)
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for rates in args.rates:
                for family in args.families:
                    for variant in args.variants:
                        run(args, cells, {"family": family, "variant": variant, "rates": rates, "seed": seed})
    rows = [row for row in cells.rows if row["task"] == args.task or args.task == "table"]
    print_recall([row for row in rows if row["task"] == "recall"])
    print_text([row for row in rows if row["task"] == "text"])
    if args.png:
        plot_text([row for row in rows if row["task"] == "text"], args.png)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["recall", "text", "table"])
    parser.add_argument("--families", nargs="+", default=["hope"], metavar="NAME", help="hope, or of configs/families")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["default"], metavar="NAME")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="memory settings of every block")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rates", nargs="+", choices=["on", "0"], default=["on", "0"], help="0: the silent control")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, help="default: 1 for recall, 2 for text")
    parser.add_argument("--steps", type=int, default=1500, help="limit of a cell (default: 1500)")
    parser.add_argument("--minutes", type=float, default=8.0, help="recall: limit of a cell (default: 8)")
    parser.add_argument("--until", default="64@1024", metavar="PAIRS[@TOKENS]", help="recall: last task")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a batch, of recall at least 4 sequences")
    parser.add_argument("--data", metavar="DIR", help="text: shards of `hope data prepare`, vocabulary 1,024")
    parser.add_argument("--context", type=int, default=1024, help="text: tokens per context")
    parser.add_argument("--png", metavar="FILE", help="text: loss by position")
    training_arguments(parser)
    args = parser.parse_args()
    args.heads = args.heads or (2 if args.task == "text" else 1)
    if args.task == "text" and not args.data:
        parser.error("text needs --data DIR; --help has the two commands that make it")
    return args


def run(args: argparse.Namespace, cells: Cells, cell: dict[str, Any]) -> None:
    """Run a cell, unless it is there."""
    cell = {
        "task": args.task,
        "width": args.width,
        "heads": args.heads,
        "lr": args.lr,
        "optimizer": args.optimizer,
    } | cell
    cell |= {"until": args.until} if args.task == "recall" else {"context": args.context, "batch_tokens": args.tokens}
    if args.task == "text" or args.steps != 1500:
        cell["limit"] = args.steps
    if args.set:
        cell["set"] = args.set
    if cells.find(**cell):
        return
    vocabulary = RECALL_VOCAB if args.task == "recall" else TEXT_VOCAB
    shape = [f"vocab_size={vocabulary}", "num_layers=2", f"hidden_size={args.width}", f"num_heads={args.heads}"]
    shape += [f"cms.levels=[{{hidden_size: {args.width}}}]", f"tie_embeddings={args.task == 'text'}"]
    settings = [f"memory.{text}" for text in args.set + VARIANTS[cell["variant"]]] + [SILENT] * (cell["rates"] == "0")
    try:
        config = small_model(cell["family"], shape, settings)
    except ValueError as error:  # a variant that the validators refuse is a result too
        cells.add(cell | {"refused": str(error)})
        return
    started = time.process_time()
    if args.task == "text":
        found = text(args, config, cell["seed"])
    else:
        found = recall(args, config, cell["seed"], yoked_to(cells, cell))
    cells.add(cell | found | {"cpu_seconds": round(time.process_time() - started)})


# --- recall ---------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """Pairs in a context; those that count must be solved to 99 %, the others only lead there."""

    pairs: int
    context: int
    counts: bool

    @property
    def unseen(self) -> int:
        """Sequences that confirm: at least 4,096 answers."""
        return max(64, 4096 // self.pairs)

    def __str__(self) -> str:
        return f"{self.pairs}@{self.context}" if self.context > 4 * self.pairs else str(self.pairs)


TASKS = [Task(4, 16, False), Task(8, 32, True), Task(8, 64, False), Task(16, 64, False)]  # 8@64: the first with fillers
TASKS += [Task(32, 128, True), Task(64, 256, True), Task(64, 512, False), Task(64, 1024, True)]


def yoked_to(cells: Cells, cell: dict[str, Any]) -> list[dict] | None:
    """The stages whose numbers of steps a control takes: those of its own block, of its seed if that was run."""
    if cell["rates"] == "on":
        return None
    block = {key: value for key, value in cell.items() if key not in ("until", "seed", "limit")} | {"rates": "on"}
    awake = cells.find(**block, seed=cell["seed"]) or cells.find(**block)
    return awake["stages"] if awake else None


def recall_batch(task: Task, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and targets [size, context]: pairs told in the first half, asked in the second; only answers count.

    Pairs lie at random even places of their half, fillers between them.
    """
    rand = lambda n: torch.rand(size, n, generator=generator).argsort(1)  # noqa: E731
    half, pairs = task.context // 4, task.pairs  # places of two tokens
    keys = rand(KEYS)[:, :pairs] + 1
    values = torch.randint(FIRST_VALUE, FIRST_FILLER, (size, pairs), generator=generator)
    order = rand(pairs)
    told = torch.stack([keys, values], -1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], -1)
    tokens = torch.randint(FIRST_FILLER, RECALL_VOCAB, (size, 2, half, 2), generator=generator)
    targets = torch.full_like(tokens, IGNORE)
    for i, content in enumerate((told, asked)):
        at = rand(half)[:, :pairs].sort(1).values[..., None].expand(-1, -1, 2)
        tokens[:, i].scatter_(1, at, content)
        if i:
            targets[:, 1, :, 0].scatter_(1, at[..., 0], asked[..., 1])  # at the key, its value comes next
    return tokens.flatten(1), targets.flatten(1)


def recall(args: argparse.Namespace, config: ModelConfig, seed: int, yoked: list[dict] | None) -> dict[str, Any]:
    """Go through the tasks. The rate falls with the error, to a tenth: rate x min(1, 4 (1 - recall))."""
    trainer = Trainer(args, config, seed)
    generator, deadline = torch.Generator().manual_seed(seed), time.process_time() + 60 * args.minutes
    names = [str(task) for task in TASKS]
    tasks, stages = TASKS[: names.index(args.until) + 1], []
    for task in tasks:
        began, accuracy, size, confirmed = trainer.steps, 0.5, max(4, args.tokens // task.context), None
        limit = args.steps
        if yoked is not None:
            limit = began + sum(stage["steps"] for stage in yoked if stage["task"] == str(task))
        goal = 0.99 if task.counts else 0.97
        while trainer.steps < limit and time.process_time() < deadline:
            tokens, targets = recall_batch(task, size, generator)
            loss = trainer.model(tokens, targets).losses.sum() / (targets != IGNORE).sum()
            norm = trainer.step(loss, max(0.1, min(1.0, 4 * (1 - accuracy))))
            if not (math.isfinite(loss.item()) and math.isfinite(norm)):
                stages.append({"task": str(task), "steps": trainer.steps - began, "recall": 0.0, "solved": False})
                return {"steps": trainer.steps, "reached": str(task), "recall": 0.0, "finite": False, "stages": stages}
            if (trainer.steps - began) % 25 == 0:
                accuracy = recall_accuracy(trainer.model, task, 64 if task.context < 512 else 16, seed=10**6)
                if accuracy >= goal:
                    if not task.counts:
                        break
                    confirmed = recall_accuracy(
                        trainer.model, task, task.unseen
                    )  # sequences that did not choose the moment
                    if confirmed >= goal:
                        break
        solved = accuracy >= goal and (not task.counts or (confirmed or 0) >= goal)
        accuracy = confirmed if solved and confirmed else recall_accuracy(trainer.model, task, task.unseen)
        stages.append({"task": str(task), "steps": trainer.steps - began, "recall": accuracy, "solved": solved})
        print("  ", stages[-1], flush=True)
        if not solved and yoked is None:
            break
    last = tasks[-1]
    final = stages[-1]["recall"] if stages[-1]["task"] == str(last) else recall_accuracy(trainer.model, last, 128)
    return {
        "steps": trainer.steps,
        "reached": stages[-1]["task"],
        "recall": final,
        "finite": True,
        "stages": stages,
    }


@torch.no_grad()
def recall_accuracy(model: torch.nn.Module, task: Task, sequences: int, seed: int = 2 * 10**6) -> float:
    """Share of right answers in unseen sequences."""
    generator, right, asked = torch.Generator().manual_seed(seed), 0, 0
    size = min(sequences, 32)
    for _ in range(sequences // size):
        tokens, targets = recall_batch(task, size, generator)
        answers = model(tokens).logits.argmax(-1)
        right += int(((answers == targets) & (targets != IGNORE)).sum())
        asked += int((targets != IGNORE).sum())
    return right / asked


def print_recall(rows: list[dict[str, Any]]) -> None:
    """Recall on each task (steps until there) and on the last one; one line per block, its seeds in a row."""
    if not rows:
        return
    names = [str(task) for task in TASKS if task.counts]
    print("\n| block | variant | inner rates | seeds | " + " | ".join(f"{n} pairs" for n in names) + " | last task |")
    print("|---" * (5 + len(names)) + "|")
    for key, group in _grouped(rows, "family", "variant", "rates").items():
        # a cell that was run again with a higher limit counts once
        group = list({row["seed"]: row for row in sorted(group, key=lambda row: row.get("steps", 0))}.values())
        cells = []
        for name in names:
            stages = [stage for row in group for stage in row.get("stages", []) if stage["task"] == name]
            cells.append(", ".join(f"{100 * s['recall']:.1f} % ({_steps_to(group, s)})" for s in stages) or "–")
        last = ", ".join(_last(row) for row in group)
        print(f"| {' | '.join(key)} | {len(group)} | {' | '.join(cells)} | {last} |")


def _last(row: dict[str, Any]) -> str:
    if "recall" not in row:
        return "refused"
    return f"{100 * row['recall']:.1f} %" if row.get("finite", True) else f"not finite at step {row['steps']}"


def _steps_to(rows: list[dict[str, Any]], stage: dict[str, Any]) -> int:
    """Steps from the start to the end of a stage."""
    stages = next(row["stages"] for row in rows if any(s is stage for s in row.get("stages", [])))
    return sum(s["steps"] for s in stages[: stages.index(stage) + 1])


# --- text -----------------------------------------------------------------------------------------------------------


def text(args: argparse.Namespace, config: ModelConfig, seed: int) -> dict[str, Any]:
    """Train on shards, then the held-out loss by position. Rate: cosine to a tenth."""
    from data_pipeline import TokenStream

    train = TokenStream(Path(args.data) / "train", args.context, seed=seed)
    size, trainer = max(1, args.tokens // args.context), Trainer(args, config, seed)
    for step in range(args.steps):
        window = torch.stack([torch.from_numpy(train.sample(step * size + i)) for i in range(size)])
        loss = trainer.model(window[:, :-1], window[:, 1:].contiguous()).losses.mean()
        trainer.step(loss, 0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        if (step + 1) % 50 == 0:
            print("  ", step + 1, round(loss.item(), 3), flush=True)
    heldout = TokenStream(Path(args.data) / "heldout", args.context, shuffle=False)
    windows = [torch.from_numpy(heldout.sample(i)) for i in range(min(64, heldout.num_windows))]
    with torch.no_grad():
        parts = torch.stack(windows).split(8)
        losses = torch.cat([trainer.model(w[:, :-1], w[:, 1:].contiguous()).losses for w in parts]).mean(0)
    edges = [0, *(2**i for i in range(4, int(math.log2(args.context)) + 1))]
    return {
        "steps": args.steps,
        "loss": losses.mean().item(),
        "edges": edges,
        "loss_by_octave": [losses[a:b].mean().item() for a, b in itertools.pairwise(edges)],
        "loss_by_eighth": [part.mean().item() for part in losses.chunk(8)],
    }


def print_text(rows: list[dict[str, Any]]) -> None:
    """Mean over seeds and spread (largest minus smallest), in nats per token."""
    rows = [row for row in rows if "loss" in row]
    if not rows:
        return
    edges = rows[0]["edges"]
    spans = [f"{a} to {b}" for a, b in itertools.pairwise(edges)]
    print("\n| block | variant | inner rates | seeds | loss | " + " | ".join(spans) + " |")
    print("|---" * (5 + len(spans)) + "|")
    for key, group in _grouped(rows, "family", "variant", "rates").items():
        octaves = [_mean_spread(list(xs)) for xs in zip(*(row["loss_by_octave"] for row in group))]
        total = _mean_spread([row["loss"] for row in group])
        print(f"| {' | '.join(key)} | {len(group)} | {total} | {' | '.join(octaves)} |")


def _mean_spread(values: list[float]) -> str:
    spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def _grouped(rows: list[dict[str, Any]], *keys: str) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return groups


def plot_text(rows: list[dict[str, Any]], out: str) -> None:
    """Loss by position: mean over seeds, a band from the smallest to the largest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours: Callable[[int], str] = ["#4C78A8", "#E4572E", "#54A24B", "#B279A2", "#F2A541", "#8C8C8C"].__getitem__
    rows = [row for row in rows if "loss" in row]
    for i, ((family, variant), of_block) in enumerate(_grouped(rows, "family", "variant").items()):
        name = family if variant == "default" else f"{family}, {variant}"
        for rates, group in _grouped(of_block, "rates").items():
            edges, columns = group[0]["edges"], list(zip(*(row["loss_by_octave"] for row in group)))
            middle = [max(1, math.sqrt(max(1, a) * b)) for a, b in itertools.pairwise(edges)]
            style = "-" if rates[0] == "on" else "--"
            label = name if rates[0] == "on" else f"{name}, inner rates 0"
            axes.plot(
                middle, [statistics.fmean(c) for c in columns], style, color=colours(i % 6), marker="o", label=label
            )
            axes.fill_between(
                middle, [min(c) for c in columns], [max(c) for c in columns], color=colours(i % 6), alpha=0.2
            )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the context, tokens")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title("Loss by position: memories heard against memories silenced", loc="left", fontweight="bold")
    axes.legend(frameon=False)
    figure.savefig(out, dpi=120)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
