"""`training.ema`: the average of the weights, exact under ZeRO and tensor parallelism, evaluated without a trace, named RUN:ema."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import tiny_run_config
from hope_megatron.testing.training import advance, build

DECAY, STEPS = 0.8, 5
# (tensor parallel, sequence parallel, ZeRO stage, precision) in a world of two; data parallel is what is left.
LAYOUTS = [
    (1, False, 0, "fp32"),
    (1, False, 1, "fp32"),
    (1, False, 2, "bf16"),
    (1, False, 3, "fp32"),
    (1, False, 3, "bf16"),
    (2, False, 0, "fp32"),
    (2, True, 1, "fp32"),
    (2, True, 3, "fp32"),
]


def unsharded_states(engine):
    """Whole tensors of every state by (name, state), put together over all ranks."""
    from hope_megatron.optim import merge_shards
    from hope_megatron.testing.optim_state import export_layout, export_state, layout_tags

    tags = {name: layout_tags(entry) for name, entry in export_layout(engine.optimizer).items()}
    shards = [None] * engine.mesh.tp_size
    torch.distributed.all_gather_object(shards, export_state(engine.optimizer), group=engine.mesh.tp_group)
    return {
        (name, key): merge_shards([shard[name][key] for shard in shards], tags[name])
        for name in tags
        for key in ("fp32", "ema")
    }


def compute_weights(engine):
    """Bits of the weights that forward uses, on this rank."""
    return {
        name: p.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, p in engine.model.named_parameters()
    }


def of(states, wanted):
    """One state of every parameter, as what a process can hand over that ends before it is read."""
    return {name: value.numpy() for (name, key), value in states.items() if key == wanted}


def averages(rank, world_size, directory):
    from hope_megatron.checkpoint.checkpointer import Checkpointer
    from hope_megatron.training.state import TrainingState

    results = {}
    tokens = torch.arange(16).remainder(7)[None]
    for tp, sp, zero, precision in LAYOUTS:
        config = tiny_run_config(
            tp=tp,
            sequence_parallel=sp,
            zero_stage=zero,
            precision=precision,
            training={"ema": DECAY, "steps": STEPS + 1},
        )
        engine, state, seen = build(config), TrainingState(), []
        for _ in range(STEPS):  # one of two CMS levels is updated every second step only
            advance(engine, config, state, 1)
            seen.append(unsharded_states(engine))
        before, raw = compute_weights(engine), engine.evaluate(tokens, tokens)[0]
        with engine.averaged_weights():
            inside, averaged = unsharded_states(engine), engine.evaluate(tokens, tokens)[0]
        after = unsharded_states(engine)
        path = Path(directory) / f"{tp}-{sp:d}-{zero}-{precision}"
        description = {
            "progress": state.to_dict(), "config": config.model_dump(mode="json"), "provenance": {}, "data": {},
        }  # fmt: skip
        Checkpointer(engine, path / "checkpoints").save_now(description)
        results[tp, sp, zero, precision] = {
            "weights": [of(step, "fp32") for step in seen],
            "average": of(seen[-1], "ema"),
            "inside": of(inside, "fp32"),
            "left no trace": before == compute_weights(engine)
            and all(torch.equal(after[key], seen[-1][key]) for key in after),
            "losses": (raw.tolist(), averaged.tolist()),
            "path": str(path),
        }
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    found = run_distributed(averages, 2, str(tmp_path_factory.mktemp("ema")), timeout_s=300)[0]
    for result in found.values():
        for states in [*result["weights"], result["average"], result["inside"]]:
            states.update({name: torch.from_numpy(value) for name, value in states.items()})
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{}-sp{:d}-zero{}-{}".format(*layout))
def test_the_average_is_that_of_whole_tensors(layout, results):
    """Bit by bit what averaging the whole weights gives, and to rounding what the definition says."""
    from hope_megatron.optim.average import update_average

    found = results[layout]
    share = torch.tensor([DECAY ** (STEPS - 1 - i) for i in range(STEPS)], dtype=torch.float64)
    share /= share.sum()
    for name, average in found["average"].items():
        expected = torch.zeros_like(average)
        for step, weights in enumerate(found["weights"], 1):
            update_average(expected, weights[name], DECAY, step)
        assert torch.equal(average, expected), name
        defined = sum(s * weights[name].double() for s, weights in zip(share, found["weights"]))
        torch.testing.assert_close(average.double(), defined, rtol=1e-6, atol=1e-7)
        assert not torch.equal(average, found["weights"][-1][name]) or "bias" in name, name


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{}-sp{:d}-zero{}-{}".format(*layout))
def test_an_evaluation_of_averaged_weights_leaves_no_trace(layout, results):
    found = results[layout]
    assert all(torch.equal(found["inside"][name], average) for name, average in found["average"].items())
    assert found["left no trace"]
    raw, averaged = found["losses"]
    assert raw[1] == averaged[1] and raw[0] != averaged[0]


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[3], LAYOUTS[6]], ids=str)
def test_commands_find_the_averaged_weights_of_a_run(layout, results):
    from hope_megatron.checkpoint.errors import ConversionError
    from hope_megatron.checkpoint.find import find_checkpoint
    from hope_megatron.checkpoint.unsharded import read_unsharded

    found = results[layout]
    for reference in (f"{found['path']}:ema", f"{found['path']}@{STEPS}:ema"):
        source = find_checkpoint(reference)
        tensors = dict(source.tensors())
        assert source.averaged and source.probe is None
        assert all(torch.equal(tensors[name], average) for name, average in found["average"].items())
    whole = read_unsharded(source)
    assert {parameter.states for parameter in whole.parameters.values()} == {("master",)}
    name = next(iter(found["average"]))
    assert torch.equal(whole.read(name, "master"), found["average"][name])
    assert whole.description["history"][-1]["decay"] == DECAY
    raw = dict(find_checkpoint(found["path"]).tensors())
    assert torch.equal(raw[name], found["weights"][-1][name])
    with pytest.raises(ConversionError, match="no complete checkpoint"):
        find_checkpoint(f"{found['path']}@3:ema")


def without_average(rank, world_size, directory):
    from hope_megatron.checkpoint.checkpointer import Checkpointer
    from hope_megatron.checkpoint.errors import ConversionError
    from hope_megatron.checkpoint.find import find_checkpoint
    from hope_megatron.checkpoint.format import CheckpointError
    from hope_megatron.training.state import TrainingState

    config, state = tiny_run_config(), TrainingState()
    engine = build(config)
    advance(engine, config, state, 1)
    description = {"progress": state.to_dict(), "config": config.model_dump(mode="json"), "provenance": {}, "data": {}}
    Checkpointer(engine, Path(directory) / "checkpoints").save_now(description)
    messages = []
    try:
        find_checkpoint(f"{directory}:ema")
    except ConversionError as error:
        messages.append(str(error))
    averaging = tiny_run_config(training={"ema": 0.9})
    try:
        Checkpointer(build(averaging), Path(directory) / "checkpoints").load_latest()
    except CheckpointError as error:
        messages.append(str(error))
    return messages


@pytest.mark.distributed
def test_weights_that_nobody_averaged_are_asked_for_in_vain(tmp_path):
    missing, other = run_distributed(without_average, 1, str(tmp_path))[0]
    assert "no averaged weights" in missing and "training.ema" in missing
    assert "ema" in other and "training.ema it was written with" in other
