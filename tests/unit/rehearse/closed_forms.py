"""The closed forms of `hope plan` against rehearsals of runs that they were not fitted to."""

from __future__ import annotations

import pytest

from hope_megatron.cli.plan import load_for_plan
from hope_megatron.config.step_time import micro_batch_works
from hope_megatron.rehearse.rehearse import rehearse
from hope_megatron.rehearse.tally import grouped, total

SMALL = ["training.steps=1", "training.seq_length=1280", "training.micro_batch_size=3", "training.global_batch_size=3"]
RUNS = {
    "memories": ["hope_tiny", "model.memory.kernel=triton", "model.memory.chunk_tokens=64", "training.recompute=layer"],
    "attention": ["transformer_pp_tiny", "training.recompute=none"],
}


@pytest.mark.parametrize("name", RUNS)
def test_counts_are_those_of_a_rehearsal(name):
    model, *overrides = RUNS[name]
    sizes = ["model.num_layers=3", "model.hidden_size=320", "model.num_heads=5", "model.vocab_size=3072"]
    config = load_for_plan(model, [*overrides, *sizes, *SMALL])
    tally, works = rehearse(config, 1)[0].micro_batch(), micro_batch_works(config)
    for phase in ("forward", "backward", *(["recompute"] if config.training.recompute == "layer" else [])):
        for what in ("kernels", "bytes", "steps"):
            planned = sum(getattr(work, what) for work in works[phase].values())
            assert planned == pytest.approx(total(tally, what, phase=phase), rel=0.02), (phase, what)
    counted = {dtype: flops for (dtype,), flops in grouped(tally, "flops", "dtype").items()}
    for dtype, flops in counted.items():
        planned = sum(work.flops.get(dtype, 0) for families in works.values() for work in families.values())
        assert planned == pytest.approx(flops, rel=0.02), dtype
