"""Measuring memories during training changes no bit of it, and tells the same in every layout."""

from __future__ import annotations

import pytest

from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import RepeatingSource, tiny_run_config

# (tensor parallel, sequence parallel, ZeRO stage) in a world of two; data parallel is what is left.
LAYOUTS = [(2, True, 1), (1, False, 2), (1, False, 3), (1, False, 0)]
STEPS, EVERY = 7, 3


def train(directory, *, memory_every=EVERY, **layout):
    """Records of a run, and the master weights after it (this rank's part)."""
    from hope_megatron.testing.optim_state import export_state
    from hope_megatron.training.metrics import read_metrics
    from hope_megatron.training.run import run_training

    training = {"steps": STEPS, "global_batch_size": 2, "memory_every": memory_every}
    config = tiny_run_config(output_dir=directory, training=training, **layout)
    run = run_training(config, RepeatingSource())
    state = export_state(run.engine.optimizer)
    return read_metrics(run.directory.metrics), {name: entry["fp32"].tolist() for name, entry in state.items()}


def run_layouts(rank, world_size, directory):
    from megatron.core import parallel_state

    results = {}
    for tp, sp, zero in LAYOUTS:
        where = f"{directory}/{tp}-{zero}"
        results[tp, sp, zero] = train(where, tp=tp, sequence_parallel=sp, zero_stage=zero)[0]
        parallel_state.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process: with and without measurements."""
    from megatron.core import parallel_state

    from hope_megatron.parallel.distributed import shutdown_distributed

    root = tmp_path_factory.mktemp("health")
    on = train(root / "on")
    parallel_state.destroy_model_parallel()
    off = train(root / "off", memory_every=0)
    yield on, off
    shutdown_distributed()


def health(record):
    return {name: value for name, value in record.items() if name.startswith(("memory/", "cms/"))}


def test_training_does_not_notice(alone):
    (records, weights), (plain, same_weights) = alone
    assert weights == same_weights
    assert [r["train/loss"] for r in records] == [r["train/loss"] for r in plain]
    assert not any(health(record) for record in plain)


def test_figures_come_when_due(alone):
    (records, _), _ = alone
    names = {r["step"]: set(health(r)) for r in records}
    layers, memories = ("layer_01", "layer_02"), ("mem", "k", "v", "eta", "alpha")
    figures = ("update_norm", "drift", "surprise")
    expected = {f"memory/{figure}/{layer}/{memory}" for figure in figures for layer in layers for memory in memories}
    expected |= {f"memory/{figure}/{layer}" for figure in ("eta", "retention") for layer in layers}
    with_memories = {step for step, found in names.items() if expected <= found}
    assert with_memories == {3, 6, 7}
    fast, slow = ({s for s, found in names.items() if f"cms/update_norm/level_{n}" in found} for n in (1, 2))
    assert {3, 6, 7} <= fast and slow == {4, 6}  # the slow level moves every second step
    assert all(0 < value < 10 for record in records for value in health(record).values())


@pytest.mark.distributed
def test_every_layout_tells_the_same(alone, tmp_path):
    (expected, _), _ = alone
    for results in run_distributed(run_layouts, 2, str(tmp_path), timeout_s=300):
        for (tp, _, zero), records in results.items():
            for step in (3, 4, 6):
                found, reference = (health(rs[step - 1]) for rs in (records, expected))
                assert found.keys() == reference.keys(), (tp, zero, step)
                if tp == 2:  # the same sequence is read; data-parallel ranks read one each
                    assert found == pytest.approx(reference, rel=2e-3), step
                else:
                    assert found == pytest.approx(reference, rel=0.6), (zero, step)
            cms = [name for name in health(records[3]) if name.startswith("cms/")]
            assert cms and all(
                records[3][name] == pytest.approx(expected[3][name], rel=2e-3) for name in cms
            ), (tp, zero)  # fmt: skip
