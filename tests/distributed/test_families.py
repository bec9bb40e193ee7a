"""Every family trains under tensor, sequence and context parallelism as it does in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from hope_megatron.config import OptimConfig, load_model_config
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.config.presets import config_names
from hope_megatron.layers.context_parallel import own_tokens
from hope_megatron.model import build_model
from hope_megatron.optim import build_optimizer
from hope_megatron.parallel.distributed import init_distributed, shutdown_distributed
from hope_megatron.parallel.sequence_parallel import reduce_sequence_parallel_gradients
from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.models import random_batch

pytestmark = pytest.mark.distributed

# armt takes tensor parallelism alone: test_tensor_parallel.py
FAMILIES = ["hope", "transformer_pp", *(name for name in config_names("families") if name != "armt")]
SMALL = [
    "vocab_size=61",
    "vocab_multiple=16",
    "num_layers=2",
    "hidden_size=32",
    "num_heads=4",
    "cms.levels=[{hidden_size: 32}]",
]
STEPS = 2


def _losses(parallel: ParallelConfig) -> dict[str, list[float]]:
    """Loss before each of two steps and after them, by family; the last shows that both updates were the same."""
    mesh, losses = init_distributed(parallel), {}
    for family in FAMILIES:
        config = load_model_config(f"{family}_tiny", SMALL)
        model = build_model(config, parallel)
        reduce_sequence_parallel_gradients(model, mesh.tp_group)
        # plain steps: what AdamW divides by its root would turn rounding into signs
        optimizer = build_optimizer(
            model.named_parameters(), OptimConfig(name="sgd", lr=0.3, vector_lr=1e-3, momentum=0)
        )
        if mesh.world_size > 1:
            optimizer.bind_plain(mesh.tp_group if mesh.tp_size > 1 else None)
        losses[family] = []
        for step in range(STEPS + 1):
            tokens, targets = random_batch(config, seed=step % STEPS)
            own, own_targets = own_tokens(tokens, 1), own_tokens(targets, 1)
            loss = model(own, own_targets).losses.sum() / tokens.numel()
            loss.backward()
            if mesh.cp_size > 1:
                for tensor in (loss.data, *(p.grad for p in model.parameters() if p.grad is not None)):
                    dist.all_reduce(tensor, group=mesh.dp_group)
            losses[family].append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    return losses


def _in_two_processes(rank: int, world_size: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    tensor_parallel = _losses(ParallelConfig(tensor_parallel=2, sequence_parallel=True))
    parallel_state.destroy_model_parallel()
    return tensor_parallel, _losses(ParallelConfig(context_parallel=2))


@pytest.fixture(scope="module")
def losses():
    alone = _losses(ParallelConfig())
    shutdown_distributed()
    return alone, run_distributed(_in_two_processes, 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mesh", [0, 1], ids=["tensor and sequence parallel", "context parallel"])
def test_two_steps_on_two_ranks(family, mesh, losses):
    alone, together = losses
    assert abs(alone[family][STEPS] - alone[family][0]) > 1e-3, "the steps changed nothing"
    for rank_losses in (rank[mesh] for rank in together):
        torch.testing.assert_close(torch.tensor(rank_losses[family]), torch.tensor(alone[family]), rtol=2e-5, atol=0)
