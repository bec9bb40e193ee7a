"""Are the memories heard? Each block is trained beside the same block with its inner rates at 0.

    python benchmarks/memory_learning.py recall --pairs 8 --models hope titans_dot deltanet
    python benchmarks/memory_learning.py recall --set read_skip=true      a variant of every model
    python benchmarks/memory_learning.py text --seeds 3                   loss by position on the Python standard library

`recall`: multi-query associative recall. A sequence tells key-value pairs and then asks for the value of every key, in
another order; two layers, width 64. A model that cannot write while it reads cannot know the answers. Reported: steps
until 99 % of the held-out answers are right, or the recall reached.

`text`: one model per block and seed on contexts of 1,024 tokens; held-out loss by position in the context. Memories that
are heard keep it falling where the silent block's is flat.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from common import machine, print_table, write_json

import torch  # isort: skip  (after common has set OpenMP's wait policy)
import numpy as np
import torch.nn.functional as F
import yaml

from hope_megatron.config.model import CMSConfig, CMSLevelConfig, MemoryConfig, ModelConfig
from hope_megatron.config.optim import OptimConfig
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.engine.distributed import init_distributed
from hope_megatron.model import build_model
from hope_megatron.model.language_model import IGNORE
from hope_megatron.optim import build_optimizer

STATIC = dict(adaptive_key=False, adaptive_value=False, adaptive_eta=False, adaptive_alpha=False, own_targets=False)
MODELS: dict[str, dict[str, Any]] = {
    "hope": {},
    "hope_external_targets": dict(own_targets=False),
    "titans_dot": STATIC,  # the deep memory with static projections, under HOPE's objective
    "titans": STATIC
    | dict(objective="l2", dgd_layers="none", momentum="data", chunk_tokens=16, eta_max=0.0625, read_skip=True),
    "deltanet": STATIC | dict(num_layers=1, dgd_layers="input", decay="none"),
    "gated_deltanet": STATIC | dict(num_layers=1, dgd_layers="input", decay_erased=True),
}
VOCAB, KEYS = 256, 120  # tokens 1..120 are keys, 121..255 values


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    init_distributed(ParallelConfig(), num_threads=args.threads)
    variant = {key: yaml.safe_load(value) for key, value in (text.split("=", 1) for text in args.set)}
    task = recall if args.task == "recall" else text
    rows = []
    for name in args.models:
        for silent in (False, True):
            if silent and args.no_silent:
                continue
            for seed in range(args.seeds):
                settings = (
                    dict(chunk_tokens=args.chunk) | MODELS[name] | variant | (dict(eta_max=0.0) if silent else {})
                )
                row = {"model": name, "rates": "0" if silent else "on", "seed": seed} | task(args, settings, seed)
                rows.append(row)
                print(row, flush=True)
    keys = [key for key in rows[0] if not isinstance(rows[0][key], list)]
    print_table(keys, [[row[key] for key in keys] for row in rows])
    write_json(args.json, {"machine": machine(), "arguments": vars(args), "rows": rows})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["recall", "text"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["hope", "titans_dot", "deltanet"])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="memory settings of every model")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--optimizer", choices=["adamw", "m3", "muon"], default="adamw")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024, help="text: tokens per context")
    parser.add_argument("--no-silent", action="store_true", help="leave the control with rates 0 out")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


def build(args: argparse.Namespace, memory: dict[str, Any], seed: int, **changes: Any):
    values = dict(num_layers=2, hidden_size=64, num_heads=2, vocab_size=VOCAB, tie_embeddings=False)
    values |= dict(
        memory=MemoryConfig(**memory), cms=CMSConfig(levels=(CMSLevelConfig(hidden_size=128),), activation="silu")
    )
    model = build_model(ModelConfig(**(values | changes)), seed=seed)
    optim = OptimConfig(name=args.optimizer, lr=args.lr, weight_decay=0.01)
    return model, build_optimizer(model.named_parameters(), optim)


def optimize(args: argparse.Namespace, model, optimizer, step: int, loss: torch.Tensor) -> None:
    """One step after a warm-up of 100, gradients clipped to norm 1."""
    for group in optimizer.param_groups:
        group["lr"] = args.lr * min(1.0, (step + 1) / 100)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def recall_batch(pairs: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets [size, 4 pairs]: pairs told, then asked in another order; only answers count."""
    keys = torch.stack([torch.randperm(KEYS, generator=generator)[:pairs] + 1 for _ in range(size)])
    values = torch.randint(KEYS + 1, VOCAB, (size, pairs), generator=generator)
    order = torch.stack([torch.randperm(pairs, generator=generator) for _ in range(size)])
    told = torch.stack([keys, values], -1).flatten(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
    tokens = torch.cat([told, asked], 1)
    targets = torch.full_like(tokens, IGNORE)
    targets[:, 2 * pairs :: 2] = tokens[:, 2 * pairs + 1 :: 2]
    return tokens, targets


def recall(args: argparse.Namespace, memory: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train until 99 % recall on unseen sequences, or the last step."""
    model, optimizer = build(args, memory, seed)
    generator, started, accuracy = torch.Generator().manual_seed(seed), time.monotonic(), 0.0
    for step in range(args.steps):
        tokens, targets = recall_batch(args.pairs, 32, generator)
        losses = model(tokens, targets).losses
        optimize(args, model, optimizer, step, losses.sum() / (targets != IGNORE).sum())
        if (step + 1) % 125 == 0:
            accuracy = recall_accuracy(model, args.pairs)
            if accuracy >= 0.99:
                break
    return {"steps": step + 1, "recall": accuracy, "seconds": time.monotonic() - started}


@torch.no_grad()
def recall_accuracy(model, pairs: int) -> float:
    tokens, targets = recall_batch(pairs, 128, torch.Generator().manual_seed(10**6))
    answers = model(tokens).logits.argmax(-1)
    return (answers == targets)[targets != IGNORE].float().mean().item()


def text(args: argparse.Namespace, memory: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train on the bytes of the Python standard library; held-out loss by position."""
    train, heldout = _standard_library_bytes()
    model, optimizer = build(args, memory, seed, num_layers=3, hidden_size=128, tie_embeddings=True)
    generator, T = torch.Generator().manual_seed(seed), args.context
    for step in range(args.steps):
        starts = torch.randint(len(train) - T - 1, (4,), generator=generator).tolist()
        window = torch.from_numpy(np.stack([train[i : i + T + 1] for i in starts])).long()
        optimize(args, model, optimizer, step, model(window[:, :-1], window[:, 1:].contiguous()).losses.mean())
    with torch.no_grad():
        window = torch.from_numpy(heldout[: 32 * (T + 1)].reshape(32, T + 1)).long()
        losses = torch.cat([model(w[:, :-1], w[:, 1:].contiguous()).losses for w in window.split(8)])
    by_position = F.avg_pool1d(losses.mean(0)[None, None], T // 8).flatten().tolist()
    return {
        "steps": args.steps,
        "loss": losses.mean().item(),
        "first_eighth": by_position[0],
        "last_eighth": by_position[-1],
        "loss_by_eighth": by_position,
    }


def _standard_library_bytes() -> tuple[np.ndarray, np.ndarray]:
    from data_pipeline.corpus import python_stdlib_documents

    documents = [document.data for document in python_stdlib_documents()]
    cut = [b"\n\n".join(documents[i::20]) for i in range(20)]
    as_bytes = lambda parts: np.frombuffer(b"\n\n".join(parts), dtype=np.uint8)  # noqa: E731
    return as_bytes(cut[1:]), as_bytes(cut[:1])


if __name__ == "__main__":
    main()
