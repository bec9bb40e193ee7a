"""A night under tensor parallelism and ZeRO: one level moves, all else stays bit for bit, a stopped night ends as it would have."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import SEQ_LENGTH, RepeatingSource, tiny_run_config

pytestmark = pytest.mark.distributed


def night_of(directory, layout):
    """A night after a run of two steps."""
    from hope_megatron.checkpoint.find import find_checkpoint
    from hope_megatron.consolidation.options import NightOptions, night_config
    from hope_megatron.consolidation.replay import rows_of
    from hope_megatron.consolidation.sleep import Night
    from hope_megatron.training.run import run_training

    config = tiny_run_config(**layout, output_dir=directory, training={"steps": 2})
    run_training(config, RepeatingSource())
    base = find_checkpoint(config.run_dir)
    text = Path(directory) / "wake.txt"
    options = NightOptions((text,), replay=3, levels=("2",), draws=4, steps=4)
    rows = {
        name: [rows_of(RepeatingSource(seed).sample(i), SEQ_LENGTH)[0] for i in range(count)]
        for name, seed, count in (("wake", 1, 5), ("general", 0, 4), ("heldout", 2, 2))
    }
    overrides = ["checkpoint.every=2", "checkpoint.keep_last=9", "optim.lr=0.01"]
    config = night_config(base.config, "night", options, 5, overrides)
    return Night(base, options, config, {**rows, "unseen": []}, 0)


def sleep(rank, world_size, directory, layout):
    from megatron.core import parallel_state

    from hope_megatron.checkpoint.find import find_checkpoint
    from hope_megatron.consolidation.sleep import sleep_on_ranks

    def again():
        parallel_state.destroy_model_parallel()

    if rank == 0:
        Path(directory, "wake.txt").write_text("read by day")
    night = night_of(directory, layout)
    again()
    sleep_on_ranks(night, RepeatingSource(), None)
    before = dict(night.base.tensors())
    after = dict(find_checkpoint(night.config.run_dir).tensors())
    torch.distributed.barrier()
    if rank == 0:  # as if the night had been stopped after its second step
        shutil.rmtree(night.config.run_dir / "checkpoints/step-00000004")
    torch.distributed.barrier()
    again()
    sleep_on_ranks(night, RepeatingSource(), None)
    resumed = dict(find_checkpoint(night.config.run_dir).tensors())
    again()
    other, error = replace(night, options=replace(night.options, replay=2)), None
    try:
        sleep_on_ranks(other, RepeatingSource(), None)
    except ValueError as found:
        error = str(found)
    return {
        "moved": [name for name in before if not torch.equal(before[name], after[name])],
        "names": list(before),
        "resumed": [name for name in after if not torch.equal(after[name], resumed[name])],
        "report": night.report.read_text(),
        "error": error,
    }


@pytest.mark.parametrize(
    "layout", [{"tp": 2, "sequence_parallel": True, "zero_stage": 1}, {"zero_stage": 3}], ids=["tp2", "zero3"]
)
def test_night(layout, tmp_path):
    found = run_distributed(sleep, 2, str(tmp_path), layout)
    first = found[0]
    assert first["moved"] == [name for name in first["names"] if ".mlp.levels.1." in name]
    assert first["resumed"] == []
    assert '"adapted"' in first["report"] and '"after"' in first["report"] and '"retention"' in first["report"]
    assert "is the night of another day: replay was 3, now 2" in first["error"]
