"""What compilers make of the memory's Triton kernels, for GPUs that need not be here: registers, spills, shared memory.

    python benchmarks/costs/memory_kernels.py --json kernels.json --md table.md
    python benchmarks/costs/memory_kernels.py --targets sm_90 --models hope_w1 --kernels '^chain'

A kernel takes 1 to 80 s. What the JSON file has for the same source and Triton version is not compiled again, so that a run
may be stopped and started. Cycles are estimates with guessed latencies, for comparing variants; nothing here has run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hope_megatron.ops.memory.backends.triton.offline import compiled, launches_of, variants
from hope_megatron.ops.memory.rule import MemoryRule

STATIC = dict(adaptive_key=False, adaptive_value=False, adaptive_eta=False, adaptive_alpha=False, own_targets=False)
MODELS = {
    "hope": MemoryRule(64),
    "hope_w1": MemoryRule(64, written_layers="output"),
    "titans": MemoryRule(
        16, objective="l2", dgd_layers="none", decay_to="zero", eta_max=0.06, momentum_max=0.6, read_skip=True, **STATIC
    ),
    "gated_deltanet": MemoryRule(64, num_layers=1, dgd_layers="input", decay_to="zero", decay_erased=True, **STATIC),
}
RATES = {"titans": (True, True, True)}
"""Which of eta, alpha and theta come from data; others: the first two."""
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
BARS = {"chain": 64, "other": 512}
"""Bytes of spills that a kernel is to stay under."""
MOST_SHARED = 113 * 1024  # two programs on a multiprocessor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), metavar="ARCH")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--kernels", default="", metavar="REGEX", help="only kernels in whose name this is found")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "tf32x3", "tf32", "fp32"])
    parser.add_argument("--width", type=int, default=64, help="of heads and memories")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where figures are kept")
    parser.add_argument("--md", type=Path, metavar="FILE", help="write a table")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    who = {"triton": version("triton")}
    known = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    old, rows = known.get("rows", []), []
    for target in args.targets:
        # Neither the other compilers nor the interpreter take NVIDIA's approximate functions.
        precision = "bf16_ptx" if args.precision == "bf16" and target.startswith("sm_") else args.precision
        for model in args.models:
            for name, launch in variants(
                launches_of(MODELS[model], args.width, precision, rates=RATES.get(model, (True, True, False)))
            ).items():
                what = who | {
                    "target": target,
                    "model": model,
                    "kernel": name,
                    "precision": precision,
                    "width": args.width,
                }
                what |= {"source": launch.kernel.cache_key[:16]}  # of all that it calls, too
                if not re.search(args.kernels, name):
                    continue
                row = next((row for row in old if what.items() <= row.items()), None) or what | _compiled(
                    launch, target
                )
                rows.append(row)
                if row not in old:
                    print(json.dumps(row), file=sys.stderr, flush=True)
                    old.append(row)
                    if args.json:
                        args.json.write_text(json.dumps({"rows": old}, indent=1) + "\n")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    table = _table(rows)
    if args.md:
        args.md.write_text(table)
    print(table)
    return 0


def _compiled(launch: Any, target: str) -> dict[str, Any]:
    try:
        return compiled(launch, target)
    except Exception as error:  # the table says which kernels an architecture does not take
        return {"error": f"{type(error).__name__}: {str(error).strip()[:200]}"}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| target | model | kernel | operands | registers | spilled B | shared KB | loop instructions | cycles (estimate) | bar |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        names = f"| {row['target']} | {row['model']} | {row['kernel']} | {row['precision']}"
        if "error" in row:
            lines.append(f"{names} | does not compile: {row['error']} | | | | | |")
            continue
        most = BARS["chain" if "chain" in row["kernel"] else "other"]
        missed = row["spilled_bytes"] > most or row["shared_bytes"] > MOST_SHARED
        walked = (f"{row[key]:,}" if key in row else "" for key in ("loop_instructions", "walk_cycles"))
        lines.append(
            f"{names} | {row['registers']} | {row['spilled_bytes']} | {row['shared_bytes'] / 1024:.0f} | "
            f"{' | '.join(walked)} | {f'missed ({most} B)' if missed else 'met'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
