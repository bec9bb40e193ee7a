"""A checkpoint rewritten for another layout holds the same tensors, and proves it or is not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.checkpoint.format import CheckpointDamagedError
from hope_megatron.checkpoint.reshard import reshard, write_checkpoint
from hope_megatron.checkpoint.unsharded import compare_unsharded, read_unsharded
from hope_megatron.cli.main import main
from hope_megatron.config import ConfigError
from hope_megatron.config.layout import ParallelLayout

MakeCheckpoint = Callable[..., CheckpointSource]


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(),
        ParallelLayout(4, 1, 1, True),
        ParallelLayout(1, 4, 3),
        ParallelLayout(2, 2, 2),
        ParallelLayout(2, 2, 0),
        ParallelLayout(1, 4, 1),
    ],
    ids=str,
)
def test_every_tensor_is_the_same_in_every_layout(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, layout: ParallelLayout
) -> None:
    source = make_checkpoint()
    written = reshard(source, layout, tmp_path / "out")
    found = CheckpointSource(tmp_path / "out")
    expected = dict(source.tensors())
    tensors = dict(found.tensors())
    assert list(tensors) == list(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert written.num_elements == sum(tensor.numel() for tensor in expected.values())
    description = found.checkpoint.description
    assert description["layout"] == layout.describe()
    assert [line["operation"] for line in description["history"]] == ["reshard"]
    assert (description["progress"], description["data"]) == (
        source.checkpoint.description["progress"],
        source.checkpoint.description["data"],
    )
    assert found.config.parallel.zero_stage == layout.zero_stage
    assert found.probe is not None and torch.equal(found.probe.logits, source.probe.logits)
    draws = {
        tuple(found.checkpoint.rank_tensors(rank, "generator/")["torch"].tolist()) for rank in range(layout.world_size)
    }
    assert len(draws) == layout.data_parallel  # tensor-parallel ranks share their generators, others must not


def test_a_layout_that_does_not_divide_leaves_nothing(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    with pytest.raises(ConfigError, match=r"num_heads=4 is not divisible by parallel\.tensor_parallel=8"):
        reshard(source, ParallelLayout(8), tmp_path / "out")
    with pytest.raises(ConfigError, match="global_batch_size=4 is not divisible by data parallel 3"):
        reshard(source, ParallelLayout(1, 3), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_there_already_stays(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    reshard(source, ParallelLayout(), tmp_path / "out")
    with pytest.raises(ConversionError, match="exists"):
        reshard(source, ParallelLayout(), tmp_path / "out")
    assert CheckpointSource(tmp_path / "out").checkpoint.verify() is None


def test_a_damaged_source_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint()
    damage(source.path / "rank-00002.safetensors")
    with pytest.raises(CheckpointDamagedError, match="rank-00002"):
        reshard(source, ParallelLayout(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def damage(file: Path) -> None:
    """Flip its last bit."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_wrong_result_is_found_and_undone(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    unsharded = read_unsharded(make_checkpoint())
    reads = []

    def changing(name: str, state: str) -> torch.Tensor:
        """The second reading of a tensor, for the comparison, differs from the first in one bit."""
        reads.append(name)
        tensor = unsharded.read(name, state).clone()
        if reads.count(name) == 2 and name == "norm.weight":
            tensor.view(torch.int32)[0] ^= 1
        return tensor

    with pytest.raises(ConversionError, match=r"master of norm\.weight"):
        write_checkpoint(replace(unsharded, read=changing), ParallelLayout(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert compare_unsharded(unsharded, unsharded) > 0


def test_command(make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    assert main(["checkpoint", "reshard", str(source.path), str(out), "--tp", "4", "--zero-stage", "0"]) == 0
    assert "tensor parallel 4, data parallel 1, zero stage 0, sequence parallel False" in capsys.readouterr().out
    assert main(["checkpoint", "inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"made by reshard of {source.path}" in shown and "all digests right" in shown and "foreign" not in shown
    (out / "rank-99999.safetensors").write_bytes(b"")
    assert main(["checkpoint", "inspect", str(out)]) == 0
    assert "foreign: rank-99999.safetensors is not in the manifest" in capsys.readouterr().out
    damage(out / "rank-00003.safetensors")
    assert main(["checkpoint", "inspect", str(out)]) == 2
    assert "rank-00003.safetensors is corrupt" in capsys.readouterr().err
    assert main(["checkpoint", "reshard", str(source.path), str(tmp_path / "three"), "--tp", "3"]) == 2
    assert "do not divide into tensor-parallel groups of 3" in capsys.readouterr().err
    assert main(["export", "hf", str(source.path), str(out), "--tp", "2"]) == 2
    assert "hope export hf does not take --tp" in capsys.readouterr().err
