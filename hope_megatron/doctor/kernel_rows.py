"""`hope doctor --kernels`: the Triton kernels against PyTorch, for the memories of every family.

On a GPU as they run there; without one under Triton's interpreter, small, which shows the mathematics and not the compiled code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

FAMILIES = ("hope", "hope_w1", "titans", "ttt_mlp", "ttt_linear", "deltanet", "gated_deltanet", "retnet")

INTERPRETED = "Triton's interpreter on a CPU, width 16: shows the mathematics, not what a GPU compiles"


def check_kernels(families: list[str], *, cuda: bool) -> list[dict[str, Any]]:
    """One row per family: {"family", "device", "taken", "trusted", "reason", "worst", "seconds"}. In a process of its own, which a
    faulty kernel may end.

    Raises:
        RuntimeError: the process ended before the last family; the message has its last line.
    """
    environment = os.environ | ({} if cuda else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", __name__, *(families or FAMILIES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(
            f"{done.stdout.count(os.linesep)} of {len(families or FAMILIES)} families were checked: {last}"
        )
    return [json.loads(line) for line in done.stdout.splitlines()]


def rows(families: list[str]) -> Iterator[dict[str, Any]]:
    """Check here, in this process."""
    import torch

    from hope_megatron.config import load_model_config
    from hope_megatron.ops.memory.backends.registry import Case
    from hope_megatron.ops.memory.backends.triton.check import LARGE, SMALL, check
    from hope_megatron.ops.memory.backends.triton.trust import identity
    from hope_megatron.ops.memory.backends.triton.unchecked import interpreted, why_not_taken

    small = interpreted()
    if small:
        from hope_megatron.ops.memory.backends.triton.interpreting import prepare_interpreter

        prepare_interpreter()
    for family in families:
        model = load_model_config(f"{family}_60m")
        memory, width = model.memory, 16 if small else model.hidden_size // model.num_heads
        rule = replace(memory.rule, chunk_tokens=16, self_chunk_tokens=None) if small else memory.rule
        rates = (memory.eta != "fixed", memory.decay != "none", memory.momentum != "none")
        device = "cpu" if small else "cuda"
        case = Case(rule, rates, 2, width, width, torch.float32, device, memory.compute.precision, True)
        row: dict[str, Any] = {"family": family, "device": INTERPRETED if small else identity(case)["device"]}
        reason = why_not_taken(case)
        if reason is not None:
            yield row | {"taken": False, "trusted": False, "reason": reason, "worst": None, "seconds": 0.0}
            continue
        began = time.monotonic()
        found = check(case, SMALL if small else LARGE)
        worst = max((error for errors in found["errors"].values() for error, _ in errors.values()), default=None)
        seconds = round(time.monotonic() - began, 1)
        yield (
            row
            | {key: found[key] for key in ("trusted", "reason")}
            | {"taken": True, "worst": worst, "seconds": seconds}
        )


if __name__ == "__main__":
    for row in rows(sys.argv[1:]):
        print(json.dumps(row), flush=True)
