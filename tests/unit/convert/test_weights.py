"""Sharded weights come back bit for bit, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.local_model import load_weights
from hope_megatron.convert.huggingface.weights import INDEX_NAME, SINGLE_NAME, read_weights, write_weights

TENSORS = {
    "a": torch.randn(10, 7),
    "b.weight": torch.randn(3).to(torch.bfloat16),
    "c": torch.randn(40, 5).t(),  # not contiguous
    "d": torch.tensor(2.5),
}


@pytest.mark.parametrize(("max_shard_bytes", "num_files"), [(1 << 20, 1), (300, 3), (1, 4)])
def test_round_trip_is_bitwise_at_any_shard_size(tmp_path: Path, max_shard_bytes: int, num_files: int) -> None:
    total = write_weights(tmp_path, TENSORS.items(), max_shard_bytes)
    assert total == sum(tensor.nbytes for tensor in TENSORS.values())
    assert len(list(tmp_path.glob("*.safetensors"))) == num_files
    assert not list(tmp_path.glob("*.part"))
    read = dict(read_weights(tmp_path))
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_index_is_what_hugging_face_reads(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS.items(), max_shard_bytes=300)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["weight_map"].keys() == TENSORS.keys()
    assert index["weight_map"]["a"] == "model-00001-of-00003.safetensors"


@pytest.mark.parametrize("damage", ["truncate", "remove", "index_escape", "index_wrong_file"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    write_weights(tmp_path, TENSORS.items(), max_shard_bytes=300)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-3])
    elif damage == "remove":
        shard.unlink()
    else:
        index["weight_map"]["a"] = f"../{SINGLE_NAME}" if damage == "index_escape" else shard.name
        (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=INDEX_NAME if damage == "index_escape" else shard.name):
        dict(read_weights(tmp_path))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.ones(2, 3)}, "lacks 1 tensors .* bias"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(3)}, r"bias has shape \[3\].*\[2\]"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "extra": torch.ones(1)}, "extra"),
    ],
)
def test_every_tensor_must_match(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        load_weights(nn.Linear(3, 2), tensors.items(), "the file")
