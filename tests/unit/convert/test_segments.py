"""ARMT's layers exist in hope_megatron alone: what would compute them without it refuses."""

from __future__ import annotations

import pytest

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.config.model import AttentionConfig
from hope_megatron.convert.huggingface.export import export_huggingface
from hope_megatron.nn import HopeBlock
from hope_megatron.testing.models import tiny_model


def test_export_to_transformers_refuses_segments(make_checkpoint, tokenizer, tmp_path) -> None:
    segments = AttentionConfig(segment_tokens=8, memory_tokens=2)
    model = tiny_model(vocab_size=tokenizer.vocab_size, layer_pattern=("attention",), attention=segments)
    source = make_checkpoint()
    vars(source)["config"] = source.config.model_copy(update={"model": model})  # read once, then kept
    with pytest.raises(ConversionError, match=r"attention\.segment_tokens=8"):
        export_huggingface(source, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_plain_layers_refuse_segments() -> None:
    with pytest.raises(ValueError, match=r"attention\.segment_tokens"):
        HopeBlock(dim=32, num_heads=4, mixer="attention", attention={"segment_tokens": 8})
