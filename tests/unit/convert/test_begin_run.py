"""Out to Hugging Face layout and back into a run: the same bits, in a checkpoint that an engine takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.tokenizer import Tokenizer
from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.find import CheckpointSource, find_checkpoint
from hope_megatron.convert.begin_run import begin_run
from hope_megatron.convert.huggingface.export import export_huggingface

BEGINNING = {"progress": {"step": 0}, "data": {"sample": 0}, "provenance": {"commit": None, "versions": {}}}


def test_weights_come_back_bit_for_bit(
    make_checkpoint: Callable[..., CheckpointSource], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = make_checkpoint()
    export_huggingface(source, tmp_path / "model", tokenizer)
    config = source.config.model_copy(update={"name": "again"})
    path = begin_run(tmp_path / "model", "hf", config, BEGINNING)
    found = find_checkpoint(str(config.run_dir))
    assert found.path == path and found.checkpoint.step == 0
    expected = dict(source.tensors())
    tensors = dict(found.tensors())
    assert list(tensors) == list(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    with pytest.raises(ConversionError, match="checkpoints already"):
        begin_run(tmp_path / "model", "hf", config, BEGINNING)


def test_another_architecture_is_refused(
    make_checkpoint: Callable[..., CheckpointSource], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = make_checkpoint()
    export_huggingface(source, tmp_path / "model", tokenizer)
    model = source.config.model.model_copy(update={"num_layers": 3})
    config = source.config.model_copy(update={"name": "again", "model": model})
    with pytest.raises(ConversionError, match=r"model\.num_layers: 2 there, 3 in the run"):
        begin_run(tmp_path / "model", "hf", config, BEGINNING)
    assert not config.run_dir.exists()
