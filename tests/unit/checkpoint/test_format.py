"""The files of a checkpoint: standard safetensors, digested, and put together from pieces of any cut."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file

from hope_megatron.checkpoint.format import (
    FORMAT,
    Checkpoint,
    CheckpointDamagedError,
    list_checkpoints,
    read_full_tensors,
    write_json,
    write_manifest,
    write_safetensors,
)
from hope_megatron.optim.geometry import split_shards
from hope_megatron.optim.tags import ParamTags

TAGS = {
    "replicated": ParamTags(role="vector"),
    "columns": ParamTags(partition_dim=1),
    "fused": ParamTags(partition_dim=0, partition_stride=2),
}
FULL = {
    "replicated": torch.arange(6.0),
    "columns": torch.arange(24.0).view(4, 6),
    "fused": torch.arange(100.0, 132.0).view(8, 4),
}


def write_checkpoint(path, tp_size=2, cuts=(0, 5, 100)):
    """Two tensor-parallel shards, each cut into pieces at `cuts` of its flattened elements, one file per piece number."""
    path.mkdir()
    digests, files, parameters = {}, [], []
    shards = {name: split_shards(FULL[name], TAGS[name], tp_size) for name in FULL}
    for tp_rank in range(tp_size):
        for part, (low, high) in enumerate(itertools.pairwise(cuts)):
            file, tensors, pieces = f"rank-{tp_rank}{part}.safetensors", {}, []
            for name in FULL:
                piece = shards[name][tp_rank].reshape(-1)[low:high]
                if piece.numel():
                    tensors |= {f"master/{name}": piece, f"m1/{name}": -piece}
                    pieces.append([name, low, piece.numel(), ["master", "m1"]])
            digests[file] = write_safetensors(path / file, tensors)
            files.append({"file": file, "tp_rank": tp_rank, "dp_rank": part, "pieces": pieces})
    for name in FULL:
        shape = list(shards[name][0].shape)
        parameters.append({"name": name, "shard_shape": shape, "dtype": "float32", "tags": TAGS[name].to_dict()})
    description = {"format": FORMAT, "layout": {"tensor_parallel": tp_size}, "parameters": parameters, "files": files}
    digests["checkpoint.json"] = write_json(path / "checkpoint.json", description)
    write_manifest(path, digests)
    return Checkpoint(path)


def test_safetensors_library_reads_what_we_write(tmp_path):
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).to(torch.bfloat16),
        "c": torch.tensor([1, 2**40]),
        "empty": torch.empty(0),
        "scalar": torch.tensor(7, dtype=torch.uint8),
        "view": torch.arange(10.0).view(2, 5).t(),
    }
    digest = write_safetensors(tmp_path / "x.safetensors", tensors, {"step": "3"})
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    assert digest.size == (tmp_path / "x.safetensors").stat().st_size


@pytest.mark.parametrize("cuts", [(0, 100), (0, 5, 100), (0, 1, 2, 9, 100)], ids=str)
def test_pieces_of_any_cut_make_the_canonical_tensor(tmp_path, cuts):
    checkpoint = write_checkpoint(tmp_path / "step-00000001", cuts=cuts)
    for name, full in FULL.items():
        assert torch.equal(checkpoint.full_tensor(name), full)
        assert torch.equal(checkpoint.full_tensor(name, "m1"), -full)
    assert [(name, tensor.shape) for name, tensor in read_full_tensors(checkpoint.path)] == [
        (n, t.shape) for n, t in FULL.items()
    ]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_ranges_of_other_tensor_parallel_sizes(tmp_path, tp_size):
    checkpoint = write_checkpoint(tmp_path / "step-00000001")
    for name in ("replicated", "fused"):
        for tp_rank in range(tp_size):
            shard = split_shards(FULL[name], TAGS[name], tp_size)[tp_rank].reshape(-1)
            assert torch.equal(
                checkpoint.reshard_range(name, "master", tp_size, tp_rank, 1, shard.numel() - 2), shard[1:-1]
            )


def test_missing_piece_is_an_error_and_not_garbage(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "step-00000001", cuts=(0, 5, 6))
    with pytest.raises(CheckpointDamagedError, match="hold 6 of the 12 elements"):
        checkpoint.full_tensor("columns")


@pytest.mark.parametrize("damage", ["flip", "truncate", "swap", "delete", "no manifest", "manifest of another format"])
def test_every_damage_is_found_and_named(tmp_path, damage):
    path = write_checkpoint(tmp_path / "step-00000001").path
    first, second = path / "rank-00.safetensors", path / "rank-10.safetensors"
    named = first.name
    if damage == "flip":
        data = bytearray(first.read_bytes())
        data[len(data) // 2] ^= 16
        first.write_bytes(bytes(data))
    elif damage == "truncate":
        first.write_bytes(first.read_bytes()[:-1])
    elif damage == "swap":
        one, other = first.read_bytes(), second.read_bytes()
        first.write_bytes(other)
        second.write_bytes(one)
    elif damage == "delete":
        first.unlink()
    elif damage == "no manifest":
        (path / "manifest.json").unlink()
        named = "manifest.json"
    else:
        (path / "manifest.json").write_text("[]")
        named = "manifest.json"
    with pytest.raises(CheckpointDamagedError, match=named):
        Checkpoint(path).verify()


def test_a_foreign_file_is_named_and_not_read(tmp_path, caplog):
    checkpoint = write_checkpoint(tmp_path / "step-00000001")
    checkpoint.verify()
    assert not caplog.messages
    (checkpoint.path / "rank-99.safetensors").write_bytes(b"nothing that could be read")
    assert checkpoint.foreign_files() == ["rank-99.safetensors"]
    assert {name for name, _ in read_full_tensors(checkpoint.path)} == set(FULL)
    assert "rank-99.safetensors is not in the manifest" in caplog.text


def test_unfinished_saves_are_not_listed(tmp_path):
    write_checkpoint(tmp_path / "step-00000010")
    write_checkpoint(tmp_path / "step-00000009")
    (tmp_path / ".tmp-step-00000011").mkdir()
    (tmp_path / "step-notes").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000009"]
