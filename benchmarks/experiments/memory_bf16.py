"""Does rounding to bf16 inside the memories change what is learned? The same trainings with `memory.precision` fp32 and bf16.

    python benchmarks/experiments/memory_bf16.py --dry-run               the commands
    python benchmarks/experiments/memory_bf16.py --out runs/bf16         all of them: many hours on two cores
    python benchmarks/experiments/memory_bf16.py --out runs/bf16 --only recall
    python benchmarks/experiments/memory_bf16.py --out runs/bf16 --short           smaller: an hour on one core
    python benchmarks/experiments/memory_bf16.py --out runs/bf16 --table           only the comparison of what is there

Three seeds each of the quickstart (held-out loss), associative recall (64 pairs; also the steps until they are recalled) and
a^n b^n, by the phases in PyTorch, which round as the GPU kernels do. --short: 100 of the quickstart's 500 steps, 8 pairs, one
optimizer for a^n b^n. Finished trainings are not run again. The difference is within seed spread if it is below the two standard
deviations of the mean difference. The quickstart's shards are read from --data (`hope quickstart` makes them).
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

TASKS = ("quickstart", "recall", "languages")
PRECISIONS = ("fp32", "bf16")
HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bf16"))
    parser.add_argument("--only", choices=TASKS, nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--data", type=Path, default=Path("runs/quickstart/data"), help="train/, heldout/, tokenizer.model"
    )
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    for command, done in commands(args):
        if args.dry_run:
            print(shlex.join(command))
        elif not args.table and not done.exists():
            done.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(command, check=True)
    if not args.dry_run:
        for task in args.only:
            print(compared(task, args))
    return 0


def commands(args: argparse.Namespace) -> list[tuple[list[str], Path]]:
    """Each with the file that is there when it has ended. Suites and recall go on by themselves, so theirs is never there."""
    hope = [sys.executable, "-m", "hope_megatron"]
    found: dict[str, list[tuple[list[str], Path]]] = {task: [] for task in TASKS}
    for seed in range(args.seeds):
        for precision in PRECISIONS:
            keys = ["memory.kernel=phases", f"memory.precision={precision}"]
            never = args.out / f"{precision}.never"
            folder = args.out / f"quickstart-{precision}-{seed}"
            changes = [f"model.{key}" for key in keys]
            changes += [f"training.seed={seed}", f"output_dir={folder}", "parallel.tensor_parallel=1"]
            changes += ["parallel.sequence_parallel=false", f"data.train={args.data / 'train'}"]
            changes += [f"data.heldout={args.data / 'heldout'}", f"data.tokenizer={args.data / 'tokenizer.model'}"]
            changes += ["training.steps=100"] if args.short else []
            command = [*hope, "train", "configs/runs/quickstart.yaml", *changes]
            found["quickstart"].append((command, folder / "hope" / "summary.json"))

            script = [sys.executable, str(HERE / "memory_learning.py"), "recall", "--rates", "on"]
            rest = ["--first-seed", str(seed), "--steps", "4000", "--minutes", "600"]
            rest += ["--until", "8" if args.short else "64", "--json", str(args.out / f"recall-{precision}.json")]
            rest += ["--set", *(key.removeprefix("memory.") for key in keys)]
            found["recall"].append(([*script, *rest], never))

            suite = [*hope, "eval", "suite", "languages", "--families", "hope", "--tasks", "a^n b^n"]
            rest = ["--seeds", str(args.seeds), "--json", str(args.out / f"languages-{precision}.json")]
            rest += ["--optimizer", "adamw", "--lr", "0.003"] if args.short else []
            if seed == 0:
                found["languages"].append(([*suite, *rest, "--hope", *keys], never))
    return [both for task in args.only for both in found[task]]


def values(task: str, precision: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """One result per seed, by its name."""
    if task == "quickstart":
        paths = [args.out / f"quickstart-{precision}-{seed}" / "hope" / "summary.json" for seed in range(args.seeds)]
        losses = [json.loads(path.read_text())["heldout_loss"] for path in paths if path.exists()]
        return {"held-out loss": losses}
    path = args.out / f"{task}-{precision}.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if task == "recall":
        rows = [row for row in found["rows"] if "recall" in row]
        return {name: [float(row[name]) for row in rows] for name in ("recall", "steps")}
    scores = [cell["scores"]["raw"] for cell in found["cells"] if cell["scores"]]
    return {name: [each[name] for each in scores] for name in scores[0]} if scores else {}


def compared(task: str, args: argparse.Namespace) -> str:
    both = {precision: values(task, precision, args) for precision in PRECISIONS}
    lines = []
    for name in both["fp32"].keys() & both["bf16"].keys():
        fp32, bf16 = both["fp32"][name], both["bf16"][name]
        lines.append(f"{task}, {name}: " + "; ".join(f"{p} {[round(x, 4) for x in both[p][name]]}" for p in PRECISIONS))
        if min(len(fp32), len(bf16)) > 1:
            difference = statistics.mean(bf16) - statistics.mean(fp32)
            twice = 2 * math.sqrt(sum(statistics.variance(found) / len(found) for found in (fp32, bf16)))
            verdict = "within" if abs(difference) <= twice else "OUTSIDE"
            lines.append(
                f"  bf16 - fp32 = {difference:+.4f}, {verdict} 2 standard deviations of the mean difference ({twice:.4f})"
            )
    return "\n".join(lines or [f"{task}: nothing yet"])


if __name__ == "__main__":
    sys.exit(main())
