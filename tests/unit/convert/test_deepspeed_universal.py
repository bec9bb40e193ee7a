"""DeepSpeed's universal format: everything comes back bit for bit, and only tensors are unpickled."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.find import CheckpointSource, find_checkpoint
from hope_megatron.checkpoint.unsharded import read_unsharded
from hope_megatron.cli.main import main
from hope_megatron.convert.begin_run import begin_run
from hope_megatron.convert.deepspeed.universal import read_universal, universal_weights, write_universal

MakeCheckpoint = Callable[..., CheckpointSource]
BEGINNING = {"progress": {"step": 0}, "data": {"sample": 0}, "provenance": {"commit": None, "versions": {}}}


def test_there_and_back_by_the_command(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    assert main(["export", "deepspeed", str(source.path), str(tmp_path / "ds")]) == 0
    assert main(["import", "deepspeed", str(tmp_path / "ds"), "--checkpoint", str(out)]) == 0
    found, expected = CheckpointSource(out), dict(source.tensors())
    assert all(torch.equal(tensor, expected.pop(name)) for name, tensor in found.tensors()) and not expected
    assert found.checkpoint.description["layout"] == source.checkpoint.description["layout"]
    assert found.checkpoint.step == 40 and found.checkpoint.description["data"] == {"sample": 160}
    assert found.probe is not None and torch.equal(found.probe.logits, source.probe.logits)


def test_weights_start_a_run(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    write_universal(read_unsharded(source), tmp_path / "ds")
    config = source.config.model_copy(update={"name": "again"})
    begin_run(tmp_path / "ds", "deepspeed", config, BEGINNING)
    expected = dict(source.tensors())
    found = dict(find_checkpoint(str(config.run_dir)).tensors())
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_changed_file_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    write_universal(read_unsharded(make_checkpoint()), tmp_path / "ds")
    path = tmp_path / "ds/global_step40_universal/zero/norm.weight/fp32.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConversionError, match=r"norm\.weight/fp32\.pt is corrupt"):
        read_universal(tmp_path / "ds")


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_acts_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "ds/tag/zero/weight"
    folder.mkdir(parents=True)
    (tmp_path / "ds/latest_universal").write_text("tag")
    torch.save({"param": _Bomb(tmp_path / "boom")}, folder / "fp32.pt")
    with pytest.raises(ConversionError, match=r"fp32\.pt is refused, nothing was executed: .* names posix\.mkdir"):
        list(universal_weights(tmp_path / "ds"))
    (folder / "fp32.pt").write_bytes(pickle.dumps(_Bomb(tmp_path / "boom")))
    with pytest.raises(ConversionError, match="refused, nothing was executed"):
        list(universal_weights(tmp_path / "ds"))
    assert not (tmp_path / "boom").exists()


def test_what_is_no_universal_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no checkpoint of DeepSpeed"):
        list(universal_weights(tmp_path))
    (tmp_path / "latest_universal").write_text("../elsewhere")
    with pytest.raises(ConversionError, match=r"names '\.\./elsewhere'"):
        list(universal_weights(tmp_path))
    with pytest.raises(ConversionError, match="hope import deepspeed DIR CONFIG"):
        read_universal(tmp_path)
