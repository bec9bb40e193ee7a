"""What the memory's Triton kernels would take on an H100: from compiled code and assumptions, without a GPU."""

from __future__ import annotations

from typing import Any

from memory_kernels import MODELS

from hope_megatron.ops.memory.backends.triton.launching import Launch
from hope_megatron.ops.memory.backends.triton.offline import launches_of, variants

ASSUMED = {
    "clock_hz": 1.755e9,
    "multiprocessors": 132,
    "schedulers": 4,
    "issued_per_cycle": 0.5,  # of a scheduler, where programs are many
    "programs_per_multiprocessor": 2,
    "pair_slowdown": 1.25,  # of a loop when two programs share a multiprocessor
    "meeting_cycles": 2000,  # of programs on several multiprocessors, once a chunk
    "launch_s": 4e-6,
    "torch_launches": {"hope": 90, "hope_w1": 80},  # operators around the kernels, forward + recomputation + backward
}
"""Guesses, each good to a factor of two at best. Bytes are left out: fused kernels move a tenth of what HBM could."""


def layer_seconds(
    model: str, rows: list[dict[str, Any]], *, batch: int, T: int, heads: int, recompute: str = "layer"
) -> list[dict[str, Any]]:
    """Per kernel of one layer, forward + recomputation + backward: {"kernel", "runs", "seconds", "limit"}.

    rows: of memory_kernels.py for sm_90 and this model. recompute: as `training.recompute`; "memory": weights at chunk starts are
    kept, and backward computes all but the loops again.
    """
    launches = launches_of(MODELS[model], 64, "bf16_ptx", recompute=recompute == "memory")
    by_name = {row["kernel"]: row for row in rows if row["model"] == model and "walk_cycles" in row}
    forward = _names(launches[: _first_backward(launches)], launches)
    found: dict[str, dict[str, Any]] = {}
    grids = {name: launch.grid for name, launch in variants(launches).items()}
    for name in [*(forward if recompute == "layer" else []), *_names(launches, launches)]:
        planes = grids[name][-1] if len(grids[name]) == 3 or "bank_chain" in name else 1
        seconds, limit = _seconds(by_name[name], name, planes, batch * heads, T // MODELS[model].chunk_tokens)
        row = found.setdefault(name, {"kernel": name, "runs": 0, "seconds": 0.0, "limit": limit})
        row["runs"] += 1
        row["seconds"] += seconds + ASSUMED["launch_s"]
    glue = ASSUMED["torch_launches"][model]
    found["PyTorch"] = {"kernel": "PyTorch", "runs": glue, "seconds": glue * ASSUMED["launch_s"], "limit": "launches"}
    return sorted(found.values(), key=lambda row: -row["seconds"])


def _first_backward(launches: list[Launch]) -> int:
    return next(i for i, x in enumerate(launches) if "backward" in x.kernel.__name__)


def _names(some: list[Launch], launches: list[Launch]) -> list[str]:
    """The names that `variants` gives, launch by launch."""
    known = variants(launches)
    same = lambda a, b: (a.kernel, a.constants) == (b.kernel, b.constants)  # noqa: E731
    return [next(name for name, y in known.items() if same(x, y)) for x in some]


def _seconds(row: dict[str, Any], name: str, planes: int, streams: int, chunks: int) -> tuple[float, str]:
    if "chain" in name:  # a program per stream (and self-memory) goes from chunk to chunk
        cycles = row["walk_cycles"] + (ASSUMED["meeting_cycles"] if planes > 1 else 0)
        return chunks * cycles * _rounds(streams, planes) / ASSUMED["clock_hz"], "latency of a chunk"
    taken = row["loop_instructions"] / (
        2 if name.startswith("bank_tape") else 1
    )  # of as many vector as scalar memories
    per_cycle = ASSUMED["multiprocessors"] * ASSUMED["schedulers"] * ASSUMED["issued_per_cycle"]
    issued = streams * chunks * taken * row["warps"] * planes / per_cycle
    alone = row["walk_cycles"]  # what one program takes
    return max(issued, alone) / ASSUMED["clock_hz"], "instruction issue"


def _rounds(streams: int, planes: int) -> float:
    """How long the loops of all streams take, in loops of one stream that runs alone."""
    processors, pair = ASSUMED["multiprocessors"], ASSUMED["pair_slowdown"]
    most = processors * ASSUMED["programs_per_multiprocessor"] // planes  # streams at once
    whole, rest = divmod(streams, most)
    return whole * pair + (pair if rest * planes > processors else 1.0 if rest else 0.0)
