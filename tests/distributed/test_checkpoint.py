"""Saving and loading: the same bits on the same layout, the same tensors on any other, and never a damaged file."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import tiny_run_config
from hope_megatron.testing.training import advance, build


def describe(config, state):
    return {"progress": state.to_dict(), "config": config.model_dump(mode="json"), "provenance": {}, "data": {}}


def local_state(engine):
    """Every tensor this rank owns, as bytes, and every clock."""
    from hope_megatron.checkpoint.generators import generator_states
    from hope_megatron.checkpoint.shards import group_scalars, live_shards

    found = {
        f"{state}/{piece.parameter}/{piece.offset}": view.contiguous().view(torch.uint8).numpy().tobytes()
        for piece in live_shards(engine)
        for state, view in piece.tensors.items()
    }
    found |= {
        name: value.contiguous().view(torch.uint8).numpy().tobytes() for name, value in generator_states().items()
    }
    found |= {
        name: p.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, p in engine.model.named_parameters()
    }
    return found, group_scalars(engine)


def full_state(engine):
    """Canonical tensors of every state, put together over all ranks; equal on all of them."""
    from hope_megatron.optim import merge_shards
    from hope_megatron.testing.optim_state import export_layout, export_state, layout_tags

    tags = {name: layout_tags(entry) for name, entry in export_layout(engine.optimizer).items()}
    shards = [None] * engine.mesh.tp_size
    torch.distributed.all_gather_object(shards, export_state(engine.optimizer), group=engine.mesh.tp_group)
    return {
        f"{key}/{name}": merge_shards([shard[name][key] for shard in shards], tags[name])
        for name in tags
        for key in shards[0][name]
        if key != "step"
    }


def changing_levels():
    """The slow level is updated in steps 2 and 7."""
    from hope_megatron.config.model import CMSConfig, CMSLevelConfig, PeriodChange

    slow = dict(update_period_steps=2, update_period_changes=(PeriodChange(from_step=2, period=5),))
    return CMSConfig(levels=(CMSLevelConfig(hidden_size=32), CMSLevelConfig(hidden_size=16, **slow)))


def same_layout(rank, world_size, directory):
    """Undisturbed 7 steps, and 4 steps + a new engine + 3 steps, inside slow periods of M3 (3) and the CMS level (2)."""
    from hope_megatron.checkpoint.checkpointer import Checkpointer
    from hope_megatron.training.state import TrainingState

    equal = {}
    for name, settings in {
        "tp2-sp-zero1": {"tp": 2, "sequence_parallel": True, "zero_stage": 1},
        "dp2-zero2-bf16": {"zero_stage": 2, "precision": "bf16"},
        "dp2-zero3": {"zero_stage": 3},
        "dp2-zero0": {"zero_stage": 0},
        "cp2-zero1, a period that was 2 and is 5": {"cp": 2, "zero_stage": 1, "cms": changing_levels()},
        "dgd-tp2-zero1": {"tp": 2, "zero_stage": 1, "mup_base_width": None, "optim": {"name": "dgd"}},
        "delta-momentum-dp2-zero2": {"zero_stage": 2, "mup_base_width": None, "optim": {"name": "delta_momentum"}},
    }.items():
        config = tiny_run_config(**{"mup_base_width": 16, "training": {"ema": 0.8}, **settings})
        engine, state = build(config), TrainingState()
        advance(engine, config, state, 4)
        path = Checkpointer(engine, Path(directory) / name).save_now(describe(config, state))
        undisturbed = advance(engine, config, state, 3)
        expected = local_state(engine)

        torch.manual_seed(rank)  # a resumed process starts from other generators
        engine, resumed = build(config), TrainingState()
        checkpoint = Checkpointer(engine, Path(directory) / name).load_latest()
        assert checkpoint.path == path
        resumed.load_dict(checkpoint.description["progress"])
        again = advance(engine, config, resumed, 3)
        equal[name] = undisturbed == again and expected == local_state(engine) and resumed.samples == state.samples
    return equal


@pytest.mark.distributed
def test_resume_is_bitwise_on_the_same_layout(tmp_path):
    for equal in run_distributed(same_layout, 2, str(tmp_path), timeout_s=240):
        assert equal == {
            "tp2-sp-zero1": True,
            "dp2-zero2-bf16": True,
            "dp2-zero3": True,
            "dp2-zero0": True,
            "cp2-zero1, a period that was 2 and is 5": True,
            "dgd-tp2-zero1": True,
            "delta-momentum-dp2-zero2": True,
        }


def other_layouts(rank, world_size, directory):
    """Save under TP2+SP ZeRO-1 and under DP2 ZeRO-3, load each under the other and under two more layouts."""
    from hope_megatron.checkpoint.checkpointer import Checkpointer
    from hope_megatron.training.state import TrainingState

    layouts = {
        "tp2": tiny_run_config(tp=2, sequence_parallel=True, zero_stage=1),
        "dp2-zero3": tiny_run_config(zero_stage=3),
        "dp2-zero1": tiny_run_config(zero_stage=1),
        "dp2-zero0": tiny_run_config(zero_stage=0),
        "cp2-zero1": tiny_run_config(cp=2, zero_stage=1),
    }
    results = {}
    for source in ("tp2", "dp2-zero3", "cp2-zero1"):
        engine, state = build(layouts[source]), TrainingState()
        advance(engine, layouts[source], state, 4)
        path = Checkpointer(engine, Path(directory) / source).save_now(describe(layouts[source], state))
        expected = full_state(engine)
        continued = advance(engine, layouts[source], state, 2)
        for target, config in layouts.items():
            engine, resumed = build(config), TrainingState()
            resumed.load_dict(
                Checkpointer(engine, Path(directory) / f"{source}-{target}").load(path).description["progress"]
            )
            found = full_state(engine)
            same = found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
            results[source, target] = same, advance(engine, config, resumed, 2), continued
    return results


@pytest.mark.distributed
def test_checkpoint_loads_at_any_other_layout(tmp_path):
    from hope_megatron.checkpoint.format import Checkpoint, read_full_tensors

    results = run_distributed(other_layouts, 2, str(tmp_path), timeout_s=240)[0]
    assert len(results) == 15
    for (source, target), (same_tensors, found, expected) in results.items():
        assert same_tensors, (source, target)
        torch.testing.assert_close(
            torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=0, msg=f"{source} -> {target}"
        )
    paths = [tmp_path / source / "step-00000004" for source in ("tp2", "dp2-zero3")]
    for name, tensor in read_full_tensors(paths[0]):
        record = Checkpoint(paths[0]).parameters[name]
        assert tensor.shape == record.full_shape(2) and tensor.dtype == torch.float32


def mup_config(**layout):
    """With parameter groups by width, which ZeRO puts into vectors of their own, and an average of weights."""
    return tiny_run_config(mup_base_width=16, training={"ema": 0.8}, **layout)


def converted_layouts(rank, world_size, directory):
    """Save under one layout, rewrite for another with one process, load that, and save what was loaded."""
    from hope_megatron.checkpoint.checkpointer import Checkpointer
    from hope_megatron.checkpoint.find import CheckpointSource
    from hope_megatron.checkpoint.reshard import reshard
    from hope_megatron.config.layout import ParallelLayout
    from hope_megatron.training.state import TrainingState

    layouts = {
        "tp2": (mup_config(tp=2, sequence_parallel=True, zero_stage=1), ParallelLayout(2, 1, 1, True)),
        "dp2-zero3": (mup_config(zero_stage=3), ParallelLayout(1, 2, 3)),
        "dp2-zero2": (mup_config(zero_stage=2), ParallelLayout(1, 2, 2)),
        "dp2-zero0": (mup_config(zero_stage=0), ParallelLayout(1, 2, 0)),
    }
    base, results = Path(directory), {}
    for source, targets in {"dp2-zero3": ("tp2", "dp2-zero0"), "tp2": ("dp2-zero3", "dp2-zero2")}.items():
        config, state = layouts[source][0], TrainingState()
        engine = build(config)
        advance(engine, config, state, 4)
        path = Checkpointer(engine, base / source).save_now(describe(config, state))
        undisturbed = advance(engine, config, state, 3)
        for target in targets:
            config, layout = layouts[target]
            converted = base / f"{source}-{target}"
            if rank == 0:
                reshard(CheckpointSource(path), layout, converted)
            engine.control.gather(None)
            engine, resumed = build(config), TrainingState()
            checkpointer = Checkpointer(engine, base / f"{source}-{target}-again")
            resumed.load_dict(checkpointer.load(converted).description["progress"])
            again = checkpointer.save_now(describe(config, resumed))
            results[source, target] = str(converted), str(again), undisturbed, advance(engine, config, resumed, 3)
    return results


@pytest.mark.distributed
def test_converted_checkpoint_is_what_the_other_layout_writes_and_trains_on_alike(tmp_path):
    from safetensors.torch import load_file

    results = run_distributed(converted_layouts, 2, str(tmp_path), timeout_s=240)[0]
    assert len(results) == 4
    for case, (converted, again, expected, found) in results.items():
        for file in ("rank-00000.safetensors", "rank-00001.safetensors"):
            left, right = load_file(Path(converted) / file), load_file(Path(again) / file)
            assert left.keys() == right.keys() and any(key.startswith("generator/") for key in left), case
            assert all(torch.equal(left[key], right[key]) for key in left), case
        losses, norms = torch.tensor(found, dtype=torch.float64).T
        expected_losses, expected_norms = torch.tensor(expected, dtype=torch.float64).T
        torch.testing.assert_close(losses, expected_losses, rtol=0, atol=1e-6, msg=f"{case}: {found} {expected}")
        torch.testing.assert_close(norms, expected_norms, rtol=1e-6, atol=0, msg=f"{case}: {found} {expected}")


def faults(rank, world_size, directory):
    """What happens to damaged checkpoints, foreign ones, and saves that fail."""
    from hope_megatron.checkpoint.checkpointer import Checkpointer, CheckpointSaveError
    from hope_megatron.checkpoint.format import CheckpointError
    from hope_megatron.training.state import TrainingState

    base, config = Path(directory), tiny_run_config()
    messages = []
    logging.getLogger("hope_megatron").addHandler(handler := _Collect(messages))
    engine, state = build(config), TrainingState()
    checkpointer = Checkpointer(engine, base / "run", keep_last=2, keep_every=4)
    seen = {}
    for _ in range(6):
        advance(engine, config, state, 1)
        checkpointer.save_now(describe(config, state))
    seen["kept"] = sorted(path.name for path in (base / "run").iterdir())
    seen["stall"] = checkpointer.take_stall_s(), checkpointer.take_stall_s()
    judged = Checkpointer(engine, base / "best", keep_last=1, keep_best=2)
    for step, loss in enumerate((3.0, 1.0, 2.0, None, 5.0), start=1):
        judged.save_now({**describe(config, TrainingState(step=step)), "heldout_loss": loss})
    seen["best"] = sorted(path.name for path in (base / "best").iterdir())
    engine.control.gather(None)  # nobody damages a file that another still lists

    def attempt(action):
        try:
            return action()
        except CheckpointError as error:
            return str(error)

    if rank == 0:
        flip(base / "run/step-00000006/rank-00001.safetensors")
        shutil.copytree(base / "run", base / "all-damaged")
        (base / "all-damaged/step-00000004/rank-00000.safetensors").unlink()
        os.truncate(base / "all-damaged/step-00000005/rank-00000.safetensors", 100)
    engine.control.gather(None)
    seen["fell back to"] = attempt(lambda: checkpointer.load_latest().step)
    engine.control.gather(None)
    seen["after"] = sorted(path.name for path in (base / "run").iterdir())
    seen["all damaged"] = attempt(Checkpointer(engine, base / "all-damaged").load_latest)
    seen["named"] = [message for message in messages if "damaged" in message]

    other = build(tiny_run_config(hidden_size=64))
    seen["other model"] = attempt(Checkpointer(other, base / "run").load_latest)

    engine = build(config)
    blocked = Checkpointer(engine, base / "blocked")
    if rank == 0:
        (base / "blocked").write_text("a file where a directory should be")
    failures = []
    for _ in range(4):
        try:
            blocked.save(describe(config, TrainingState(step=1)))
            blocked.poll()
            failures.append("goes on")
        except CheckpointSaveError as error:
            failures.append(str(error))
            break
    seen["failed saves"] = failures
    logging.getLogger("hope_megatron").removeHandler(handler)
    return seen


class _Collect(logging.Handler):
    def __init__(self, messages):
        super().__init__()
        self.messages = messages

    def emit(self, record):
        self.messages.append(record.getMessage())


def flip(path, position=-5):
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.distributed
def test_faults_are_caught_on_all_ranks(tmp_path):
    first, second = run_distributed(faults, 2, str(tmp_path), timeout_s=240)
    assert first["kept"] == ["step-00000004", "step-00000005", "step-00000006"]
    assert first["best"] == ["step-00000002", "step-00000003", "step-00000005"]
    for seen in (first, second):
        assert 0.0 == seen["stall"][1] < seen["stall"][0]
        assert seen["fell back to"] == 5
        assert seen["after"] == ["abandoned-step-00000006", "step-00000004", "step-00000005"]
        for part in ("every checkpoint", "step-00000006/rank-00001.safetensors is corrupt", "100 bytes", "is missing"):
            assert part in seen["all damaged"]
        assert "model.hidden_size: 32 in the checkpoint, 64 in this run" in seen["other model"]
        assert seen["failed saves"][:2] == ["goes on", "goes on"]
        assert "failure 3 in a row" in seen["failed saves"][2]
    assert "rank-00001.safetensors is corrupt" in first["named"][0]
