"""DeepSpeed's own files for a layout: everything comes back bit for bit, and their own tool reads them.

What DeepSpeed itself makes of them is in tests/distributed/test_deepspeed_zero.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hope_megatron.checkpoint import placement
from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.checkpoint.skeleton import skeleton
from hope_megatron.checkpoint.unsharded import compare_unsharded, read_unsharded
from hope_megatron.cli.main import main
from hope_megatron.config.layout import ParallelLayout
from hope_megatron.convert.deepspeed.native import read_native, write_native
from hope_megatron.convert.deepspeed.zero import ZeroDirectory
from hope_megatron.testing.tiny import tiny_run_config

MakeCheckpoint = Callable[..., CheckpointSource]


def test_there_and_back_by_the_command(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, directory, out = make_checkpoint(), tmp_path / "ds", tmp_path / "out"
    layout = ["--tp", "4", "--dp", "2", "--zero-stage", "3"]
    assert main(["export", "deepspeed", str(source.path), str(directory), *layout]) == 0
    assert "tensor parallel 4, data parallel 2" in capsys.readouterr().out
    assert len(list(directory.glob("global_step40/*_optim_states.pt"))) == 8
    assert main(["import", "deepspeed", str(directory), "--checkpoint", str(out)]) == 0
    found, expected = CheckpointSource(out), dict(source.tensors())
    assert all(torch.equal(tensor, expected.pop(name)) for name, tensor in found.tensors()) and not expected
    assert ParallelLayout.of(found.checkpoint.description["layout"]) == ParallelLayout(4, 2, 3)
    history = [line["operation"] for line in found.checkpoint.description["history"]]
    assert history == ["export to deepspeed", "import from deepspeed"]
    assert found.probe is not None and found.checkpoint.step == 40


def test_deepspeeds_own_tool_reads_it(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    source = make_checkpoint()
    for stage in (1, 2, 3):
        write_native(read_unsharded(source), ParallelLayout(1, 2, stage), tmp_path / str(stage))
        found, expected = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / str(stage))), dict(source.tensors())
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_large_groups_are_cut_into_several_vectors(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "_SUB_GROUP_NUMEL", 2000)
    unsharded = read_unsharded(make_checkpoint())
    members = skeleton(unsharded.config).members
    vectors = placement.flat_vectors(unsharded.parameters, members, ParallelLayout(2, 2, 3))
    assert len(vectors) > len(members)
    assert all(sum(runs[0].numel for runs in list(vector.runs.values())[:-1]) < 2000 for vector in vectors)
    write_native(unsharded, ParallelLayout(2, 2, 3), tmp_path / "ds")
    assert compare_unsharded(unsharded, read_native(tmp_path / "ds")) > 0


def test_groups_are_those_of_training_at_any_width() -> None:
    found = skeleton(tiny_run_config(mup_base_width=16))
    assert found.groups["matrix/width"]["lr"] < found.groups["matrix/no_decay"]["lr"]
    assert "layers.0.mixer.qkv.weight" in found.members["matrix/width"]
    assert found.group_of["embedding.weight"] == "vector"


def test_damage_and_what_cannot_be(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    unsharded = read_unsharded(make_checkpoint())
    with pytest.raises(ConversionError, match="--zero-stage 1, 2 or 3"):
        write_native(unsharded, ParallelLayout(2, 2, 0), tmp_path / "ds")
    write_native(unsharded, ParallelLayout(2, 2, 1), tmp_path / "ds")
    path = tmp_path / "ds/global_step40/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConversionError, match=rf"{path.name} is corrupt"):
        read_native(tmp_path / "ds")
    path.rename(path.with_name("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"))
    with pytest.raises(ConversionError, match="are of one rank"):
        ZeroDirectory(tmp_path / "ds")
    (tmp_path / "ds/hope/manifest.json").unlink()
    with pytest.raises(ConversionError, match="hope import deepspeed DIR CONFIG"):
        read_native(tmp_path / "ds")
