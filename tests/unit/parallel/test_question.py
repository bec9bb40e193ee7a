"""What ranks decide a step by."""

from __future__ import annotations

import math

import pytest
import torch

from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.parallel.distributed import init_distributed
from hope_megatron.parallel.question import UpdateQuestion


@pytest.fixture
def question():
    mesh = init_distributed(ParallelConfig())
    return UpdateQuestion(mesh.world_group, mesh.device)


def test_reads_everything_together_in_its_order(question):
    question.read_beside = lambda: [torch.tensor([2.5]), 15, torch.tensor(7)]
    assert question.ask(torch.tensor(3.0))
    assert (question.norm, question.beside) == (3.0, [2.5, 15, 7])


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])  # -1 is DeepSpeed's sign for a norm that is not finite
def test_refuses_what_is_not_finite(question, norm):
    question.read_beside = lambda: [torch.tensor(math.inf)]
    assert not question.ask(torch.tensor(norm))
    assert math.isnan(question.norm) and math.isnan(question.beside[0])
