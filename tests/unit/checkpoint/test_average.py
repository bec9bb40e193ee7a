"""Averages of checkpoints, and weights alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hope_megatron.checkpoint.average import average
from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.checkpoint.reshard import write_checkpoint
from hope_megatron.checkpoint.unsharded import UnshardedCheckpoint, read_unsharded
from hope_megatron.cli.main import main
from hope_megatron.config.layout import ParallelLayout

MakeCheckpoint = Callable[..., CheckpointSource]


def trained(unsharded: UnshardedCheckpoint, factor: float, step: int) -> UnshardedCheckpoint:
    """As if training had scaled all weights; with an optimizer state and its clock."""
    parameters = {name: replace(p, states=("master", "m1")) for name, p in unsharded.parameters.items()}
    groups = {p.tags.group_name: {"step": step} for p in unsharded.parameters.values()}
    description = {
        **unsharded.description,
        "progress": {**unsharded.description["progress"], "step": step},
        "optimizer": {"name": "m3", "groups": groups},
    }
    read = lambda name, state: unsharded.read(name, "master") * factor  # noqa: E731
    return replace(unsharded, parameters=parameters, description=description, read=read)


def test_the_command_averages_weights(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unsharded = read_unsharded(make_checkpoint())
    for name, factor, step in (("a", 1.0, 40), ("b", 2.0, 60), ("c", 4.0, 50)):
        write_checkpoint(trained(unsharded, factor, step), ParallelLayout(2, 1, 3), tmp_path / name)
    sources = [str(tmp_path / name) for name in "abc"]
    assert main(["checkpoint", "average", *sources, str(tmp_path / "mean"), "--weights", "1,2,1"]) == 0
    assert main(["checkpoint", "average", *sources[:2], str(tmp_path / "plain"), "--tp", "1", "--dp", "2"]) == 0
    capsys.readouterr()
    for out, factor in (("mean", 2.25), ("plain", 1.5)):
        found = CheckpointSource(tmp_path / out)
        for name, tensor in found.tensors():
            torch.testing.assert_close(tensor, unsharded.read(name, "master") * factor)
            assert found.checkpoint.states(name) == ("master",)
        assert found.checkpoint.step == 60  # of the newest
        assert {clock["step"] for clock in found.checkpoint.description["optimizer"]["groups"].values()} == {0}
        assert found.probe is None  # its logits are of other weights
        assert found.checkpoint.description["data"] == unsharded.description["data"]
        draws = [found.checkpoint.rank_tensors(rank, "generator/")["torch"] for rank in range(2)]
        assert torch.equal(draws[0], unsharded.generators(0, 0)["torch"])
    assert main(["checkpoint", "average", *sources, str(tmp_path / "x"), "--weights", "1,2"]) == 2
    assert "2 numbers for 3 checkpoints" in capsys.readouterr().err


def test_the_command_extracts_weights(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    unsharded = read_unsharded(make_checkpoint())
    write_checkpoint(trained(unsharded, 3.0, 50), ParallelLayout(), tmp_path / "a")
    assert main(["checkpoint", "weights", str(tmp_path / "a"), str(tmp_path / "out")]) == 0
    found = CheckpointSource(tmp_path / "out")
    assert all(torch.equal(tensor, unsharded.read(name, "master") * 3.0) for name, tensor in found.tensors())
    assert all(found.checkpoint.states(name) == ("master",) for name in found.checkpoint.parameters)
    assert found.probe is not None and torch.equal(
        found.checkpoint.rank_tensors(0, "generator/")["torch"], unsharded.generators(0, 0)["torch"]
    )
    description, before = found.checkpoint.description, unsharded.description
    assert description["data"] == before["data"] and description["progress"]["samples"] == 160
    assert {clock["step"] for clock in description["optimizer"]["groups"].values()} == {0}


def test_other_models_and_weights_without_a_mean_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    unsharded = read_unsharded(make_checkpoint())
    with pytest.raises(ConversionError, match="positive sum"):
        average([unsharded, unsharded], [1.0, -1.0])
    config = {
        **unsharded.description["config"],
        "model": {**unsharded.description["config"]["model"], "norm_epsilon": 1e-5},
    }
    other = replace(unsharded, origin="elsewhere", description={**unsharded.description, "config": config})
    with pytest.raises(ConversionError, match="elsewhere is another model"):
        average([unsharded, other], [1.0, 1.0])
