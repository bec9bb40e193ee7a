"""A tiny HOPE with a real tokenizer, as the commands open it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from hope_megatron.config import ParallelConfig
from hope_megatron.convert.open_model import OpenModel
from hope_megatron.model import build_model
from hope_megatron.parallel.distributed import init_distributed
from hope_megatron.testing.models import tiny_model

LINES = [f"def function_{i}(argument, value={i}):\n    return argument + value * {i}\n" for i in range(300)]


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    """Random weights, large enough that predictions differ clearly; the self-memories are no identities."""
    tokenizer: Tokenizer = train_tokenizer(LINES, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 300)
    init_distributed(ParallelConfig())
    model = build_model(tiny_model(vocab_size=tokenizer.vocab_size), seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith(("vector_out", "scalar_out")):
            parameter.normal_(0.0, 0.2, generator=generator)
        elif parameter.dim() == 2:
            parameter.mul_(3.0)
    return OpenModel("tiny", model, tokenizer, window_tokens=16, run=None)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Some text of the tokenizer's kind."""
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES[:6]), encoding="utf-8")
    return path
