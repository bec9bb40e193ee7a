"""Directories that DeepSpeed itself saved under ZeRO start a run, bit for bit; a pickle that acts is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hope_megatron.convert.begin_run import begin_run
from hope_megatron.convert.deepspeed_zero import zero_shards
from hope_megatron.convert.errors import ConversionError
from hope_megatron.convert.source import find_checkpoint
from hope_megatron.engine.checkpoint_format import read_full_tensors
from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import RepeatingSource, tiny_run_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2-zero1": {"zero_stage": 1},
    "dp2-zero2-bf16": {"zero_stage": 2, "precision": "bf16"},
    "dp2-zero3": {"zero_stage": 3},
    "tp2-zero1": {"tp": 2, "zero_stage": 1},
    "tp2-zero3": {"tp": 2, "zero_stage": 3},
}


def save_both(rank, world_size, directory):
    """Train two steps in each layout; DeepSpeed saves it, and so do we."""
    from megatron.core import parallel_state

    from hope_megatron.engine.build import build_engine
    from hope_megatron.engine.checkpoint import Checkpointer
    from hope_megatron.engine.distributed import init_distributed
    from hope_megatron.training.batches import BatchReader
    from hope_megatron.training.state import TrainingState
    from hope_megatron.training.step import train_step

    for name, settings in LAYOUTS.items():
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        config, state = tiny_run_config(**settings), TrainingState()
        engine = build_engine(config, init_distributed(config.parallel))
        with BatchReader(RepeatingSource(), config, engine.mesh) as reader:
            for _ in range(2):
                train_step(engine, reader, state, config)
        engine._deepspeed.save_checkpoint(str(Path(directory) / name / "deepspeed"))
        description = {"progress": state.to_dict(), "config": config.model_dump(mode="json")}
        Checkpointer(engine, Path(directory) / name / "ours").save_now({**description, "provenance": {}, "data": {}})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("zero")
    run_distributed(save_both, 2, str(directory), timeout_s=240)
    return directory


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_start_a_run_bit_for_bit(saved: Path, tmp_path: Path, name: str) -> None:
    config = tiny_run_config(output_dir=tmp_path)
    beginning = {"progress": {"step": 0}, "data": {}, "provenance": {"commit": None, "versions": {}}}
    begin_run(saved / name / "deepspeed", "deepspeed", config, beginning)
    found = dict(find_checkpoint(str(config.run_dir)).tensors())
    expected = dict(read_full_tensors(saved / name / "ours/step-00000002"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.distributed
def test_a_pickle_that_acts_and_a_missing_rank_are_refused(saved: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(saved / "dp2-zero1/deepspeed", directory)
    file = directory / "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": _Bomb(tmp_path / "boom")}, file)
    with pytest.raises(ConversionError, match=rf"{file.name} is refused, nothing was executed: .* posix\.mkdir"):
        list(zero_shards(directory))
    assert not (tmp_path / "boom").exists()
    file.unlink()
    with pytest.raises(ConversionError, match="on 2 data-parallel ranks, and 1 files are there"):
        list(zero_shards(directory))
