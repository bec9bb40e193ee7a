"""A tiny HOPE in this process."""

from __future__ import annotations

import pytest

from hope_megatron.config import ParallelConfig
from hope_megatron.model import LanguageModel, build_model
from hope_megatron.parallel.distributed import init_distributed
from hope_megatron.testing.models import tiny_model as tiny_config


@pytest.fixture(scope="session")
def tiny_model() -> LanguageModel:
    """Random weights, large enough that logits differ clearly."""
    init_distributed(ParallelConfig())
    model = build_model(tiny_config(), seed=0).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() > 1:
            parameter.mul_(3.0)
    return model
