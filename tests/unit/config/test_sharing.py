"""What sharing a sequence sends: states are those of a built model, and ways that cannot be are refused."""

from __future__ import annotations

import pytest

from hope_megatron.config import ConfigError
from hope_megatron.config.load import resolve_run_config
from hope_megatron.config.sharing import attention_exchanges, slice_config, state_bytes


def run_of(model, *overrides):
    data = {
        "name": "test",
        "model": model,
        "training": {"steps": 100, "seq_length": 1024, "global_batch_size": 8},
        "optim": {"warmup_steps": 0},
        "data": {"train": "a", "tokenizer": "b"},
    }
    return resolve_run_config(data, list(overrides), source="test")


@pytest.mark.parametrize("overrides", [[], ["model.memory.momentum=constant", "model.memory.adaptive_eta=false"]])
def test_the_state_is_that_of_a_built_model(overrides):
    from hope_megatron.model import build_model
    from hope_megatron.ops.memory.types import map_params
    from hope_megatron.parallel.distributed import init_distributed

    run = run_of("hope_tiny", "model.num_layers=2", *overrides)
    init_distributed(run.parallel)
    built = 0
    for layer in build_model(run.model, run.parallel).init_state(1).layers:
        stacks = [layer.conv]
        map_params(stacks.append, layer.memory.now)
        if layer.memory.momentum is not None:
            map_params(stacks.append, layer.memory.momentum)
        built += sum(4 * x.numel() for x in stacks)
    assert state_bytes(run.model) == built


def test_ring_attention_sends_more_with_every_rank_and_heads_for_tokens_do_not():
    sent = [
        attention_exchanges(run_of("hope_760m", "training.seq_length=1536", f"parallel.context_parallel={cp}"))
        for cp in (2, 8, 24)
    ]
    assert [x["ring attention"] / (2 * 1536 * 2) for x in sent] == [1, 7, 23]
    assert [x["ulysses"] / (4 * 1536 * 2) for x in sent] == [1 / 2, 7 / 8, pytest.approx(23 / 24)]


def test_a_slice_is_as_much_work_for_a_rank():
    run = run_of("hope_tiny", "training.truncate_tokens=512")
    part = slice_config(run, 4)
    assert part.training.tokens_per_step == run.training.tokens_per_step
    assert (part.training.seq_length, part.training.truncate_tokens) == (256, 128)


@pytest.mark.parametrize(
    ("model", "ranks", "message"),
    [
        ("hope_tiny", 3, "do not divide into slices of whole chunks"),
        ("transformer_pp_tiny", 2, "this model has attention"),
    ],
)
def test_slices_that_cannot_be(model, ranks, message):
    with pytest.raises(ConfigError, match=message):
        slice_config(run_of(model), ranks)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.context_parallel=8"], "model.num_heads=4 is not divisible .* --pass-states N says"),
        (["parallel.tensor_parallel=2", "parallel.context_parallel=4"], "tensor_parallel=2 x context_parallel=4"),
        (["parallel.context_parallel=4", "training.truncate_tokens=2"], "2 tokens that are read at once"),
        (
            [
                "parallel.context_parallel=2",
                "training.reduction=canonical",
                "parallel.zero_stage=0",
                "training.precision=fp32",
            ],
            "canonical with .* context_parallel=2",
        ),
    ],
)
def test_layouts_that_cannot_be(overrides, message):
    with pytest.raises(ConfigError, match=message):
        run_of("hope_tiny", *overrides)
