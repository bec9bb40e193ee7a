"""Does rounding to bf16 inside the memories change what is learned? The same trainings with `memory.precision` fp32 and bf16.

    python benchmarks/experiments/memory_bf16.py --dry-run               the commands
    python benchmarks/experiments/memory_bf16.py --out runs/bf16         all of them: many hours on two cores
    python benchmarks/experiments/memory_bf16.py --out runs/bf16 --only recall
    python benchmarks/experiments/memory_bf16.py --out runs/bf16 --table only the comparison of what is there

Three seeds each of the quickstart (held-out loss), associative recall (64 pairs) and a^n b^n (longer strings), by the phases in
PyTorch, which round as the GPU kernels do. Finished trainings are not run again. The difference is within seed spread if it is
below the two standard deviations of the mean difference. `hope quickstart` first: its shards are read.
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
    found: list[tuple[list[str], Path]] = []
    hope = [sys.executable, "-m", "hope_megatron"]
    for precision in PRECISIONS:
        keys = ["memory.kernel=phases", f"memory.precision={precision}"]
        never = args.out / f"{precision}.never"
        if "quickstart" in args.only:
            for seed in range(args.seeds):
                folder = args.out / f"quickstart-{precision}-{seed}"
                changes = [f"model.{key}" for key in keys]
                changes += [f"training.seed={seed}", f"output_dir={folder}", "parallel.tensor_parallel=1"]
                changes += ["parallel.sequence_parallel=false"]
                found.append(
                    ([*hope, "train", "configs/runs/quickstart.yaml", *changes], folder / "hope" / "summary.json")
                )
        if "recall" in args.only:
            script = [sys.executable, str(HERE / "memory_learning.py"), "recall", "--rates", "on", "--until", "64"]
            rest = ["--seeds", str(args.seeds), "--steps", "4000", "--minutes", "600"]
            rest += ["--json", str(args.out / f"recall-{precision}.json")]
            found.append(([*script, *rest, "--set", *(key.removeprefix("memory.") for key in keys)], never))
        if "languages" in args.only:
            suite = [*hope, "eval", "suite", "languages", "--families", "hope", "--tasks", "a^n b^n"]
            rest = ["--seeds", str(args.seeds), "--json", str(args.out / f"languages-{precision}.json")]
            found.append(([*suite, *rest, "--hope", *keys], never))
    return found


def values(task: str, precision: str, args: argparse.Namespace) -> list[float]:
    """One result per seed: held-out loss, share recalled, share of the longest strings."""
    if task == "quickstart":
        paths = [args.out / f"quickstart-{precision}-{seed}" / "hope" / "summary.json" for seed in range(args.seeds)]
        return [json.loads(path.read_text())["heldout_loss"] for path in paths if path.exists()]
    path = args.out / f"{task}-{precision}.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    if task == "recall":
        return [row["recall"] for row in found["rows"] if "recall" in row]
    cells = [cell["scores"]["raw"] for cell in found["cells"] if cell["scores"]]
    return [scores[max(scores, key=lambda name: int(name.split("-")[0]))] for scores in cells]


def compared(task: str, args: argparse.Namespace) -> str:
    both = {precision: values(task, precision, args) for precision in PRECISIONS}
    lines = [f"{task}: " + "; ".join(f"{name} {[round(x, 4) for x in found]}" for name, found in both.items())]
    if all(len(found) > 1 for found in both.values()):
        difference = statistics.mean(both["bf16"]) - statistics.mean(both["fp32"])
        spread = math.sqrt(sum(statistics.variance(found) / len(found) for found in both.values()))
        verdict = "within" if abs(difference) <= 2 * spread else "OUTSIDE"
        lines.append(
            f"  bf16 - fp32 = {difference:+.4f}, {verdict} 2 standard deviations of the mean difference ({2 * spread:.4f})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
