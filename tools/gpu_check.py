"""What a GPU has to say about this project, in about ten minutes: `make gpu-check`.

Runs the tests that need a GPU, measures training beside its rehearsal, and writes a dated JSON and page with a verdict per line.
Without a GPU it says what it would do, and exits with 0. It downloads nothing.

examples:
  python tools/gpu_check.py                         everything that this machine can do
  python tools/gpu_check.py --only tests hope_340m  some lines
  python tools/gpu_check.py --dry-run               what would be run
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PEAK_TOLERANCE = 0.10
"""By which a rehearsed peak may miss the measured one: the allocator's fragments are not rehearsed."""


class Line(NamedTuple):
    """One line of the check."""

    name: str
    question: str
    command: list[str]
    limit_s: int
    devices: int = 1


def lines(out: Path) -> list[Line]:
    """All lines, in the order in which they run."""
    python = sys.executable
    found = [
        Line(
            "tests",
            "do operators, steps, ZeRO, offload and resuming work?",
            [python, "-m", "pytest", "-q", "tests/gpu"],
            300,
        ),
    ]
    for name, more in MODELS.items():
        train = [python, "benchmarks/train.py", "--model", name, "--json", str(out / f"{name}.json"), *more]
        found.append(Line(name, "how fast does it train, and how much memory does it take?", train, 240))
    for name, more in MODELS.items():
        rehearse = [
            python,
            "-m",
            "hope_megatron",
            "rehearse",
            name,
            "--world",
            "1",
            "--json",
            str(out / f"{name}.rehearsed.json"),
        ]
        found.append(Line(f"rehearse {name}", "did the rehearsal say so?", [*rehearse, *_overrides(more)], 240))
    costs = "benchmarks/costs/memory_gpu.py"
    if (ROOT / costs).exists():
        found.append(
            Line(
                "memory operator",
                "which kernel is the fastest?",
                [python, costs, "--json", str(out / "memory.json")],
                120,
            )
        )
    several = [python, "-m", "pytest", "-q", "tests/gpu/test_many.py"]
    found.append(Line("several GPUs", "does it train over NCCL?", several, 300, devices=2))
    return found


MODELS = {
    "hope_tiny": ["--seq-length", "1024"],
    "transformer_pp_tiny": ["--seq-length", "1024"],
    "hope_340m": ["--layers", "6", "--micro-batch", "4", "training.recompute=layer"],
    "transformer_pp_340m": ["--layers", "6", "--micro-batch", "4"],
    "hope_760m": ["--layers", "6", "--micro-batch", "8", "training.recompute=layer"],
    "transformer_pp_760m": ["--layers", "6", "--micro-batch", "8"],
}
"""Presets, each with what shortens it."""


def _overrides(options: list[str]) -> list[str]:
    """Options of benchmarks/train.py as overrides of `hope rehearse`, for the same run."""
    pairs = dict(zip(options[::2], options[1::2])) if options and options[0].startswith("--") else {}
    micro_batch = pairs.get("--micro-batch", "1")
    found = [
        f"training.seq_length={pairs.get('--seq-length', 4096)}",
        f"training.micro_batch_size={micro_batch}",
        f"training.global_batch_size={micro_batch}",
        *(word for word in options if "=" in word),
    ]
    if not any(word.startswith("training.recompute") for word in found):
        found.append("training.recompute=none")
    return [*found, f"model.num_layers={pairs['--layers']}"] if "--layers" in pairs else found


def gpus() -> list[str]:
    """Names of the GPUs that torch sees."""
    try:
        import torch
    except ImportError:
        return []
    return (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )


def run(line: Line) -> dict[str, Any]:
    """Run a line: its verdict, seconds and last words."""
    began = time.monotonic()
    try:
        done = subprocess.run(line.command, cwd=ROOT, capture_output=True, text=True, timeout=line.limit_s, check=False)
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, text = None, str(error)
    return {
        "name": line.name,
        "question": line.question,
        "command": " ".join(line.command),
        "verdict": "good" if code == 0 else f"not within {line.limit_s} s" if code is None else "failed",
        "seconds": round(time.monotonic() - began, 1),
        "last_words": text.strip().splitlines()[-12:],
    }


def compared(name: str, out: Path) -> dict[str, Any] | None:
    """Measured and rehearsed, side by side; None if one of them is missing."""
    files = out / f"{name}.json", out / f"{name}.rehearsed.json"
    if not all(file.exists() for file in files):
        return None
    measured, rehearsed = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    real = measured["models"][name]
    peak, foretold = real["peak_memory_bytes"], rehearsed["peak_memory_bytes"]
    step, planned = real["step_seconds"]["median"], rehearsed["step_s"]
    near = abs(foretold / peak - 1) <= PEAK_TOLERANCE
    return {
        "name": f"{name}: rehearsed against measured",
        "verdict": "good" if near else "the rehearsed peak is wrong",
        "tokens_per_second": real["tokens_per_second"],
        "model_flops_utilization": real["model_flops_utilization"],
        "peak_memory_bytes": {"measured": peak, "rehearsed": foretold},
        "step_seconds": {"measured": step, "rehearsed": planned},
    }


def page(report: dict[str, Any]) -> str:
    """The report as a page."""
    rows = ["| line | verdict | |", "|---|---|---|"]
    for line in report["lines"]:
        figures = {
            key: value
            for key, value in line.items()
            if key not in ("name", "question", "verdict", "command", "last_words")
        }
        rows.append(f"| {line['name']} | {line['verdict']} | {json.dumps(figures)} |")
    head = (
        f"# GPU check, {report['date']}\n\n{', '.join(report['gpus'])}; torch {report['torch']}; `make gpu-check`.\n\n"
    )
    return head + "\n".join(rows) + "\n"


def main() -> int:
    """Run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "gpu_check", help="where results go (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", metavar="LINE", help="names of lines")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    args = parser.parse_args()
    found = gpus()
    chosen = [line for line in lines(args.out) if args.only is None or line.name in args.only]
    if not chosen:
        print(
            f"--only {' '.join(args.only)}: no such line; known: {', '.join(line.name for line in lines(args.out))}",
            file=sys.stderr,
        )
        return 2
    if not found or args.dry_run:
        print(
            "This would be run:"
            if found
            else "torch sees no CUDA device here: nothing was run. On a GPU this would be run:"
        )
        for line in chosen:
            print(f"  {line.name:<26} {line.question}\n{'':<28} {' '.join(line.command)}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for line in chosen:
        if len(found) < line.devices:
            results.append({"name": line.name, "verdict": f"not run: it needs {line.devices} GPUs"})
        else:
            results.append(run(line))
        print(f"{line.name:<26} {results[-1]['verdict']}", flush=True)
    results += [line for name in MODELS if (line := compared(name, args.out)) is not None]
    import torch

    date = datetime.date.today().isoformat()
    report = {"date": date, "gpus": found, "torch": torch.__version__, "lines": results}
    (args.out / f"{date}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / f"{date}.md").write_text(page(report), encoding="utf-8")
    print(f"written: {args.out / date}.json and .md")
    return 0 if all(line["verdict"] == "good" or line["verdict"].startswith("not run") for line in results) else 1


if __name__ == "__main__":
    sys.exit(main())
