"""The Triton kernels on the GPU at hand, compiled as they train, against PyTorch in float64. Not run yet: no GPU was at hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hope_megatron.config import load_model_config
from hope_megatron.ops.memory.backends.registry import Case
from hope_megatron.ops.memory.backends.triton.check import check
from hope_megatron.ops.memory.backends.triton.unchecked import why_not_taken

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["hope", "hope_w1", "ttt_linear", "deltanet", "gated_deltanet", "retnet"])
@pytest.mark.parametrize("width, chunk", [(32, 16), (64, 64), (128, 128)])
def test_outputs_states_and_gradients(family, width, chunk, precision):
    """Random and adversarial keys, a state handed on, and the same bits twice: what the self-check does."""
    memory = load_model_config(f"{family}_60m").memory
    rule = replace(memory.rule, chunk_tokens=chunk, self_chunk_tokens=None)
    rates = (memory.eta != "fixed", memory.decay != "none", memory.momentum != "none")
    case = Case(rule, rates, 2, width, width, torch.float32, "cuda", precision, True)
    if (reason := why_not_taken(case)) is not None:
        pytest.skip(f"the kernels do not take it here: {reason}")
    found = check(case)
    assert found["trusted"], found["reason"]
