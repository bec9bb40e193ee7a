"""The closed forms of `hope plan` against rehearsals of runs that they were not fitted to."""

from __future__ import annotations

import pytest

from hope_megatron.config.footprint import footprint
from hope_megatron.config.hardware import find_hardware
from hope_megatron.config.planned_run import load_for_plan
from hope_megatron.config.step_time import micro_batch_works, step_transfers, step_works
from hope_megatron.rehearse.rehearse import rehearse
from hope_megatron.rehearse.tally import grouped, total
from hope_megatron.rehearse.verdict import verdict

SMALL = ["training.steps=1", "training.seq_length=1280", "model.num_layers=3", "model.vocab_size=3072"]
SEVERAL = ["training.micro_batch_size=3", "training.global_batch_size=3", "model.hidden_size=320", "model.num_heads=5"]
SPLIT = ["training.micro_batch_size=1", "training.global_batch_size=1", "model.hidden_size=384", "model.num_heads=6"]
SPLIT += ["parallel.context_parallel=2"]
MEMORIES = ["hope_tiny", "model.memory.kernel=triton", "model.memory.chunk_tokens=64", "training.recompute=layer"]
RUNS = {
    "memories": [*MEMORIES, *SEVERAL],
    "more streams than run at once": [
        *MEMORIES,
        *SEVERAL,
        "training.micro_batch_size=14",
        "training.global_batch_size=14",
    ],
    "attention": ["transformer_pp_tiny", "training.recompute=none", "optim.name=adamw", *SEVERAL],
    "one sequence over two ranks": [*MEMORIES, *SPLIT],
    "three sequences over two ranks": [
        *MEMORIES,
        *SPLIT,
        "training.micro_batch_size=3",
        "training.global_batch_size=3",
    ],
}


@pytest.mark.parametrize("name", RUNS)
def test_counts_are_those_of_a_rehearsal(name):
    model, *overrides = RUNS[name]
    config = load_for_plan(model, [*overrides, *SMALL])
    world = config.parallel.context_parallel
    depths, watch = rehearse(config, world)
    tally, works = depths.micro_batch(), micro_batch_works(config)
    for phase in ("forward", "backward", *(["recompute"] if config.training.recompute == "layer" else [])):
        for what in ("kernels", "bytes", "steps"):
            planned = sum(getattr(work, what) for work in works[phase].values())
            assert planned == pytest.approx(total(tally, what, phase=phase), rel=0.02), (phase, what)
    step, planned_step = depths.step(), step_works(config, world)
    for phase in ("reduction", "update"):
        for what in ("kernels", "bytes"):
            planned = sum(getattr(work, what) for work in planned_step[phase].values())
            assert planned == pytest.approx(total(step, what, phase=phase), rel=0.02), (phase, what)
    update = {dtype: flops for (p, dtype), flops in grouped(step, "flops", "phase", "dtype").items() if p == "update"}
    assert planned_step["update"]["products"].flops == pytest.approx(update, rel=1e-6)
    counted = {dtype: flops for (dtype,), flops in grouped(tally, "flops", "dtype").items()}
    for dtype, flops in counted.items():
        planned = sum(work.flops.get(dtype, 0) for families in works.values() for work in families.values())
        assert planned == pytest.approx(flops, rel=0.02), dtype
    exchanged = {phase: x for (phase, operator), x in exchanges(step).items() if operator == "alltoall"}
    planned = {t.phase: (t.count, t.bytes) for t in step_transfers(config, world) if t.operator == "alltoall"}
    assert planned == exchanged
    reduced = [(t.count, t.bytes) for t in step_transfers(config, world) if t.phase == "reduction"]
    assert tuple(map(sum, zip(*reduced))) == exchanges(step).get(("reduction", "allreduce"), ())
    peak = verdict(depths, watch.groups, world, find_hardware("h100"))["peak_memory_bytes"]
    assert footprint(config, world).total == pytest.approx(peak, rel=0.05)


def exchanges(tally):
    """(calls, bytes) of collectives by phase and operator."""
    found = {}
    for (what, phase, operator, *_), value in tally.items():
        if what in ("collective", "collective_bytes"):
            calls, moved = found.get((phase, operator), (0, 0))
            found[phase, operator] = (calls + value, moved) if what == "collective" else (calls, moved + value)
    return found
