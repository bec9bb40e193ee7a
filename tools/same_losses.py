"""Do two commits train alike? The same small runs at both, losses and gradient norms compared bit for bit.

    python tools/same_losses.py                            # the commit before the rooms were moved, and this one
    python tools/same_losses.py --before v0.1 --after HEAD --case hope_m3 --json same_losses.json

Each commit is checked out into a git worktree of its own and runs `hope train` from there: one process, one thread, fp32,
PyTorch's memory kernel. Text, tokenizer and shards are made once, by the older commit. What changed its default or its
name since is set explicitly (CASES, `on_pytorch`), so that both files mean the same. Exit code 1 if any bit differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BEFORE_THE_MOVE = "79a01a3"
COMPARED = ("train/loss", "train/grad_norm", "heldout/loss")
VOCAB = 384

Case = dict[str, Any]


def _run(
    mixer: str, optimizer: dict[str, Any], memory: dict[str, Any] | None = None, period: int = 1, **training: Any
) -> Case:
    """A run file of two small layers; every key that has had another default is written out."""
    rule = {"chunk_tokens": 8, "input_scale": 1.0, "decay_to": "initial", "eta_init": 0.1, "output_gate": "none"}
    model = {
        "vocab_size": VOCAB, "num_layers": 2, "hidden_size": 32, "num_heads": 2, "layer_pattern": [mixer],
        "cms": {"levels": [{"hidden_size": 32}, {"hidden_size": 32, "update_period_steps": period}]},
    }  # fmt: skip
    if mixer == "memory":
        model["memory"] = rule | (memory or {})
    return {
        "model": model,
        "optim": {"lr": 5e-3, "warmup_steps": 2, "ns_dtype": "float32", "grad_clip": 1.0} | optimizer,
        "training": {
            "steps": 8, "seq_length": 32, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32",
            "log_every": 1, "eval_every": 4, "eval_sequences": 4, "seed": 1234,
        } | training,
        "tracking": {"mlflow": False},
    }  # fmt: skip


CASES: dict[str, Case] = {
    "hope_m3": _run("memory", {"name": "m3", "slow_period_steps": 3}),
    "hope_w1_muon": _run("memory", {"name": "muon"}, {"written_layers": "output"}, recompute="memory"),
    "titans_adamw": _run(
        "memory",
        {"name": "adamw"},
        {"objective": "l2", "dgd_layers": "none", "momentum": "data", "own_targets": False, "chunk_tokens": 4},
    ),
    "attention_adamuon": _run("attention", {"name": "adamuon"}, recompute="layer"),
    # Levels with a period sum their gradients since fbe3cc1, where they were averaged: the same up to rounding and epsilon.
    "attention_clocked": _run("attention", {"name": "adamuon"}, period=2),
}


def on_pytorch(case: Case, source: Path) -> tuple[Case, dict[str, str]]:
    """The same run on PyTorch's memory kernel, as a checkout asks for it: by a key, and before there was one by a variable."""
    if (source / "hope_megatron/ops/memory/native").is_dir():
        return case, {"HOPE_NATIVE": "0"}
    if "memory" not in case["model"]:
        return case, {}
    return case | {"model": case["model"] | {"memory": case["model"]["memory"] | {"kernel": "torch"}}}, {}


@contextlib.contextmanager
def checkout(commit: str, directory: Path) -> Iterator[Path]:
    """A worktree of a commit, removed afterwards."""
    git = ["git", "worktree"]
    subprocess.run([*git, "add", "--detach", str(directory), commit], check=True, capture_output=True)
    try:
        yield directory
    finally:
        subprocess.run([*git, "remove", "--force", str(directory)], check=True, capture_output=True)


def hope(source: Path, *arguments: str, **environment: str) -> None:
    """`hope ARGUMENTS` from a checkout, with its own code."""
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    variables |= {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(
        [sys.executable, "-m", "hope_megatron", *arguments], cwd=source, env=variables, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(
            f"{source.name}: hope {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )


def make_data(source: Path, root: Path) -> dict[str, str]:
    """Text drawn from a fixed seed, its tokenizer and its shards. Returns the `data` section of a run file."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghiklmnoprstuw", k=draw.randint(2, 7))) for _ in range(300)]
    for number in range(24):
        (root / f"text-{number}.txt").write_text(" ".join(draw.choices(words, k=400)))
    texts = str(root / "text-*.txt")
    tokenizer, shards = root / "tokenizer.model", root / "data"
    hope(source, "data", "tokenizer", texts, "--vocab-size", str(VOCAB), "--out", str(tokenizer))
    hope(source, "data", "prepare", texts, "--tokenizer", str(tokenizer), "--out", str(shards), "--held-out", "0.2")
    return {"train": str(shards / "train"), "heldout": str(shards / "heldout"), "tokenizer": str(tokenizer)}


def train(source: Path, name: str, case: Case, root: Path) -> dict[str, list[float]]:
    """Figures of each step of one run."""
    output = root / source.name
    config = root / f"{source.name}-{name}.yaml"
    case, environment = on_pytorch(case, source)
    config.write_text(json.dumps({"name": name, "output_dir": str(output)} | case))  # JSON is YAML
    hope(source, "train", str(config), **environment)
    records = [json.loads(line) for line in (output / name / "metrics.jsonl").read_text().splitlines()]
    return {key: [record[key] for record in records if key in record] for key in COMPARED}


def first_difference(before: Mapping[str, list[float]], after: Mapping[str, list[float]]) -> str | None:
    """Where two runs part, in words; None if every bit is the same."""
    for key in COMPARED:
        if len(before[key]) != len(after[key]) or not before[key]:
            return f"{key}: {len(before[key])} records before, {len(after[key])} after"
        for number, (old, new) in enumerate(zip(before[key], after[key], strict=True), start=1):
            if old.hex() != new.hex():
                return f"{key}, record {number}: {old!r} before, {new!r} after ({new - old:+.1e})"
    return None


def compare(before: str, after: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Train every case at both commits."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="same-losses-") as folder, contextlib.ExitStack() as stack:
        root = Path(folder)
        old, new = (
            stack.enter_context(checkout(commit, root / side))
            for side, commit in (("before", before), ("after", after))
        )
        data = make_data(old, root)
        for name in names:
            case = CASES[name] | {"data": data}
            figures = train(old, name, case, root), train(new, name, case, root)
            found[name] = {"difference": first_difference(*figures), "before": figures[0], "after": figures[1]}
            print(f"{name}: {found[name]['difference'] or summary(figures[1])}", flush=True)
    return found


def summary(figures: Mapping[str, list[float]]) -> str:
    """One line about a run that is the same at both commits."""
    losses = figures["train/loss"]
    return f"the same bits, {sum(map(len, figures.values()))} figures; train/loss {losses[0]:.6f} to {losses[-1]:.6f}"


def main() -> int:
    """Compare, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE_THE_MOVE, help="the older commit (default: %(default)s)")
    parser.add_argument("--after", default="HEAD", help="the newer commit (default: %(default)s)")
    parser.add_argument(
        "--case", action="append", choices=list(CASES), help="only this run; may be given several times"
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    found = compare(options.before, options.after, options.case or list(CASES))
    if options.json:
        options.json.write_text(
            json.dumps({"before": options.before, "after": options.after, "cases": found}, indent=1)
        )
    return 1 if any(case["difference"] for case in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
