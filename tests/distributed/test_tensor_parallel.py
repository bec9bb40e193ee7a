"""Tensor and sequence parallelism do not change the mathematics."""

from __future__ import annotations

import pytest
import torch

from hope_megatron.config.model import AttentionConfig, MemoryConfig, MupConfig
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.layers.parameters import initialize_parameters, normal
from hope_megatron.model import build_model
from hope_megatron.parallel.distributed import init_distributed, shutdown_distributed
from hope_megatron.parallel.sequence_parallel import reduce_sequence_parallel_gradients
from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.models import random_batch, tiny_model

pytestmark = pytest.mark.distributed

STATIC = dict(adaptive_key=False, adaptive_value=False, adaptive_eta=False, adaptive_alpha=False, own_targets=False)
CASES = {
    "hope": tiny_model(memory=MemoryConfig(chunk_tokens=8, self_chunk_tokens=16, momentum="data", output_gate="silu")),
    "hope_untied": tiny_model(tie_embeddings=False),
    "constant_rates": tiny_model(
        memory=MemoryConfig(chunk_tokens=8, eta_max=0.5, decay="constant", momentum="constant", query_correction=0.5)
    ),
    "retnet": tiny_model(memory=MemoryConfig(num_layers=1, dgd_layers="none", eta="fixed", decay="retnet", **STATIC)),
    "rwkv7": tiny_model(
        memory=MemoryConfig(num_layers=1, dgd_layers="input", rates_of="channel", decay_to="zero", **STATIC)
    ),
    "transformer": tiny_model(layer_pattern=("attention",)),
    "qwen": tiny_model(
        layer_pattern=("attention",), attention=AttentionConfig(num_kv_heads=2, qkv_bias=True, qk_norm=True)
    ),
    "armt": tiny_model(
        layer_pattern=("attention",), attention=AttentionConfig(num_kv_heads=2, segment_tokens=10, memory_tokens=3)
    ),
    "mixed": tiny_model(layer_pattern=("attention", "memory")),
    "mup": tiny_model(layer_pattern=("attention",), mup=MupConfig(base_width=16), tie_embeddings=False),
}


def modes(case: str) -> tuple[str, ...]:
    """Segments of ARMT are read one after the other, which sequence parallelism cannot."""
    return ("tp2",) if case == "armt" else ("tp2", "tp2_sp")


def _loss_logits_gradients(model_config, parallel: ParallelConfig):
    """Loss, logits and the full gradient of every parameter, assembled over tensor parallelism."""
    mesh = init_distributed(parallel)
    torch.manual_seed(mesh.rank)  # initial weights must not depend on ambient generators
    model = build_model(model_config, parallel)
    for name, parameter in model.named_parameters():
        if "associative.value" in name:  # begins with 0, where nothing is written
            parameter.initializer = normal(0.5)
    initialize_parameters(model, seed=1234)
    reduce_sequence_parallel_gradients(model, mesh.tp_group)
    tokens, targets = random_batch(model_config)
    loss = model(tokens, targets).losses.mean()
    loss.backward()
    logits = model(tokens).logits.detach()
    gradients = {}
    for name, p in model.named_parameters():
        grad = p.grad
        if p.tensor_model_parallel and mesh.tp_size > 1:
            parts = [torch.empty_like(grad) for _ in range(mesh.tp_size)]
            torch.distributed.all_gather(parts, grad.contiguous(), group=mesh.tp_group)
            blocks = [part.chunk(p.partition_stride, p.partition_dim) for part in parts]
            grad = torch.cat([block[i] for i in range(p.partition_stride) for block in blocks], p.partition_dim)
        gradients[name] = grad.clone().numpy()
    return loss.item(), logits.numpy(), gradients


def _all_meshes(rank: int, world_size: int):
    results = {}
    for case, model in CASES.items():
        for mode in modes(case):
            parallel = ParallelConfig(tensor_parallel=2, sequence_parallel=mode == "tp2_sp")
            results[case, mode] = _loss_logits_gradients(model, parallel)
    return results


@pytest.fixture(scope="module")
def parallel_results():
    return run_distributed(_all_meshes, 2)


@pytest.fixture(scope="module")
def single_results():
    results = {case: _loss_logits_gradients(model, ParallelConfig()) for case, model in CASES.items()}
    shutdown_distributed()
    return results


@pytest.mark.parametrize(("case", "mode"), [(case, mode) for case in CASES for mode in modes(case)])
def test_loss_logits_and_every_gradient(case, mode, single_results, parallel_results):
    loss, logits, gradients = single_results[case]
    for rank_results in parallel_results:
        other_loss, other_logits, other_gradients = rank_results[case, mode]
        assert other_loss == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(torch.from_numpy(other_logits), torch.from_numpy(logits), rtol=1e-5, atol=1e-5)
        assert gradients.keys() == other_gradients.keys()
        for name, gradient in gradients.items():
            expected, found = torch.from_numpy(gradient), torch.from_numpy(other_gradients[name])
            error = (found - expected).norm() / expected.norm().clamp_min(1e-8)
            assert error < 1e-5, f"{name}: relative error {error:.1e}"
