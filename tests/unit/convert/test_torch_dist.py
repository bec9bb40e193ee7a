"""Megatron-Core's distributed format: everything comes back bit for bit, and nothing foreign is executed."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.find import CheckpointSource, find_checkpoint
from hope_megatron.checkpoint.unsharded import read_unsharded
from hope_megatron.cli.main import main
from hope_megatron.convert.begin_run import begin_run
from hope_megatron.convert.torch_dist import _MetadataUnpickler, read_torch_dist, torch_dist_weights, write_torch_dist
from hope_megatron.model import LanguageModel

MakeCheckpoint = Callable[..., CheckpointSource]
BEGINNING = {"progress": {"step": 0}, "data": {"sample": 0}, "provenance": {"commit": None, "versions": {}}}


def test_there_and_back_by_the_command(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    assert main(["export", "torch_dist", str(source.path), str(tmp_path / "dist")]) == 0
    assert "numbers read back, all equal" in capsys.readouterr().out
    assert main(["import", "torch_dist", str(tmp_path / "dist"), "--checkpoint", str(out), "--tp", "1"]) == 0
    found = CheckpointSource(out)
    expected = dict(source.tensors())
    assert all(torch.equal(tensor, expected.pop(name)) for name, tensor in found.tensors()) and not expected
    assert [line["operation"] for line in found.checkpoint.description["history"]] == [
        "export to torch_dist",
        "import from torch_dist",
    ]
    assert found.checkpoint.tp_size == 1 and torch.equal(found.probe.logits, source.probe.logits)


def test_pytorch_and_megatron_load_it(make_checkpoint: MakeCheckpoint, tmp_path: Path, model: LanguageModel) -> None:
    from megatron.core import dist_checkpointing

    write_torch_dist(read_unsharded(make_checkpoint()), tmp_path / "dist")
    target = {name: torch.full_like(parameter, float("nan")).detach() for name, parameter in model.named_parameters()}
    dcp.load(target, checkpoint_id=tmp_path / "dist", no_dist=True)
    assert all(torch.equal(target[name], parameter) for name, parameter in model.named_parameters())
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(tmp_path / "dist"))
    assert loaded["iteration"] == 40
    assert all(torch.equal(loaded["model"][name], parameter) for name, parameter in model.named_parameters())


def test_weights_written_by_others_start_a_run(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, model: LanguageModel
) -> None:
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dcp.save(
        {**weights, "optimizer.state.exp_avg.x": torch.ones(3), "rng_state": {"a": 1}}, checkpoint_id=tmp_path / "dist"
    )
    config = make_checkpoint().config.model_copy(update={"name": "again"})
    begin_run(tmp_path / "dist", "torch_dist", config, BEGINNING)
    found = dict(find_checkpoint(str(config.run_dir)).tensors())
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
    with pytest.raises(ConversionError, match="do not say what model"):
        read_torch_dist(tmp_path / "dist")


@pytest.mark.parametrize("file", [".metadata", "common.pt", "hope/checkpoint.json", "__0_0.distcp"])
def test_a_changed_file_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path, file: str) -> None:
    write_torch_dist(read_unsharded(make_checkpoint()), tmp_path / "dist")
    path = tmp_path / "dist" / file
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConversionError, match=f"{file} is corrupt"):
        read_torch_dist(tmp_path / "dist")
    path.unlink()
    with pytest.raises(ConversionError, match=f"{file} is missing"):
        read_torch_dist(tmp_path / "dist")


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_acts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist/.metadata").write_bytes(pickle.dumps(_Bomb(tmp_path / "boom")))
    with pytest.raises(ConversionError, match=r"refused, nothing was executed: it names posix\.mkdir"):
        list(torch_dist_weights(tmp_path / "dist"))
    assert not (tmp_path / "boom").exists()


def test_members_of_enumerations_are_read_as_old_pythons_write_them() -> None:
    """Python 3.11.0 to 3.11.3 write `getattr(WriteItemType, "TENSOR")`. Nothing else is taken by getattr."""

    def loaded(kind: str, name: str):
        return _MetadataUnpickler(io.BytesIO(f"cbuiltins\ngetattr\n(c{kind}\nS'{name}'\ntR.".encode())).load()

    assert loaded("torch.distributed.checkpoint.planner\nWriteItemType", "TENSOR") is dcp.planner.WriteItemType.TENSOR
    for kind, name in (
        ("torch.distributed.checkpoint.planner\nWriteItemType", "__class__"),
        ("torch.distributed.checkpoint.planner\nSavePlan", "__init__"),
        ("torch\nfloat32", "itemsize"),
    ):
        with pytest.raises(pickle.UnpicklingError, match="no member of an enumeration"):
            loaded(kind, name)
