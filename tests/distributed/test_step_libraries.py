"""A run whose linears add their weight gradients to float32 sums, as with NVIDIA's apex. Its kernel is one line of PyTorch here;
what calls it is Megatron-Core's, and the sums are DeepSpeed's."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import tiny_run_config

LAYOUTS = {
    "data parallel, layers recomputed": {"training": {"recompute": "layer"}},
    "tensor and sequence parallel": {"tp": 2, "sequence_parallel": True},
}


def train(rank, world_size, config):
    """Gradients of a step, and what two more steps give: as a CPU runs, and with what a GPU would choose."""
    from megatron.core.tensor_parallel import layers

    from hope_megatron.engine import new_engine
    from hope_megatron.engine.libraries import choose_libraries
    from hope_megatron.testing.training import advance, build
    from hope_megatron.training.state import TrainingState

    calls = []

    def wgrad_gemm_accum_fp32(x, d_y, main_grad):
        assert x.dim() == d_y.dim() == 2 and main_grad.dtype == torch.float32
        calls.append(main_grad.shape)
        main_grad.add_(d_y.float().t().matmul(x.float()))

    def as_on_a_gpu(config, device):
        choose_libraries(config, "cuda", elsewhere=True)

    def run(config):
        engine, state = build(config), TrainingState()
        tokens = torch.arange(64).view(4, 16) % 61 + engine.mesh.data_rank
        for row in range(engine.accumulation_steps):
            engine.forward_backward(tokens[row : row + 1], tokens.roll(-1, 1)[row : row + 1], 64)
        left = sum(p.grad is not None for p in engine.model.parameters())
        engine._deepspeed.allreduce_gradients()
        gradients = torch.cat([shard.flatten() for shard in engine.gradient_shards()])
        engine.step()
        linears = sum(hasattr(p, "main_grad") for p in engine.model.parameters())
        return gradients, advance(engine, config, state, 2), left, linears

    plain = run(config)
    named = config.training.libraries.model_copy(update={"weight_gradient": "apex"})
    config = config.model_copy(update={"training": config.training.model_copy(update={"libraries": named})})
    kernels = SimpleNamespace(wgrad_gemm_accum_fp32=wgrad_gemm_accum_fp32)
    with (
        patch.object(layers, "fused_weight_gradient_mlp_cuda", kernels, create=True),
        patch.object(new_engine, "choose_libraries", as_on_a_gpu),
    ):
        fused = run(config)
    return *plain, *fused, len(calls)


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_and_training_are_those_of_separate_kernels(name):
    config = tiny_run_config(precision="bf16", **LAYOUTS[name])
    for gradients, history, left, none, found, its_history, its_left, linears, calls in run_distributed(
        train, 2, config
    ):
        assert none == 0 and linears >= 10 and left == its_left == 0
        micro_batches = 3 * config.accumulation_steps(2)
        assert calls == linears * micro_batches
        assert (found - gradients).abs().max() <= 2**-7 * gradients.abs().max()
        torch.testing.assert_close(torch.tensor(its_history), torch.tensor(history), rtol=0.02, atol=0)
