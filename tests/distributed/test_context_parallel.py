"""Context parallelism does not change the mathematics: a sequence over several ranks gives what it gives on one, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hope_megatron.config.model import AttentionConfig, MemoryConfig
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.layers.context_parallel import own_tokens
from hope_megatron.model import build_model
from hope_megatron.parallel.distributed import init_distributed, shutdown_distributed
from hope_megatron.parallel.sequence_parallel import reduce_sequence_parallel_gradients
from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.models import random_batch, tiny_model

pytestmark = pytest.mark.distributed

STATIC = dict(adaptive_key=False, adaptive_value=False, adaptive_eta=False, adaptive_alpha=False, own_targets=False)
CASES = {
    "hope": tiny_model(
        num_heads=4, memory=MemoryConfig(chunk_tokens=8, self_chunk_tokens=16, momentum="data", output_gate="silu")
    ),
    "hope_w1": tiny_model(num_heads=4, memory=MemoryConfig(chunk_tokens=8, written_layers="output")),
    "constant_rates": tiny_model(
        num_heads=4,
        memory=MemoryConfig(chunk_tokens=8, eta_max=0.5, decay="constant", momentum="constant", query_correction=0.5),
    ),
    "retnet": tiny_model(
        num_heads=4, memory=MemoryConfig(num_layers=1, dgd_layers="none", eta="fixed", decay="retnet", **STATIC)
    ),
    "transformer": tiny_model(num_heads=8, layer_pattern=("attention",), attention=AttentionConfig(num_kv_heads=4)),
    "window": tiny_model(
        num_heads=4, layer_pattern=("attention", "memory"), attention=AttentionConfig(window_tokens=5)
    ),
}
MESHES = {
    "cp2": ParallelConfig(context_parallel=2),
    "cp4": ParallelConfig(context_parallel=4),
    "tp2 cp2": ParallelConfig(tensor_parallel=2, context_parallel=2),
    "tp2 cp2 sp": ParallelConfig(tensor_parallel=2, context_parallel=2, sequence_parallel=True),
}


def figures(case, parallel, documents):
    """Loss, logits and the full gradient of every parameter, assembled over the mesh."""
    mesh = init_distributed(parallel)
    config = CASES[case]
    model = build_model(config, parallel, dtype=torch.float64)
    reduce_sequence_parallel_gradients(model, mesh.tp_group)
    tokens, targets = random_batch(config)
    numbers = (torch.arange(tokens.size(1)) * 3 // tokens.size(1)).expand_as(tokens) if documents else None
    own, own_targets = own_tokens(tokens, 1), own_tokens(targets, 1)
    loss = model(own, own_targets, documents=numbers).losses.double().sum()
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss, group=mesh.dp_group)
    logits = None if documents else model(own).logits.detach().numpy()
    return loss.item(), logits, {name: whole(p, mesh).numpy() for name, p in model.named_parameters()}


def whole(p, mesh):
    """The full gradient: parts of context-parallel ranks are summed, shards of tensor-parallel ranks joined."""
    grad = p.grad.contiguous()
    dist.all_reduce(grad, group=mesh.dp_group)
    if not p.tensor_model_parallel or mesh.tp_size == 1:
        return grad
    parts = [torch.empty_like(grad) for _ in range(mesh.tp_size)]
    dist.all_gather(parts, grad, group=mesh.tp_group)
    blocks = [part.chunk(p.partition_stride, p.partition_dim) for part in parts]
    return torch.cat([block[i] for i in range(p.partition_stride) for block in blocks], p.partition_dim)


def on_mesh(rank, world_size, name):
    return {(case, documents): figures(case, MESHES[name], documents) for case in CASES for documents in (False, True)}


@pytest.fixture(scope="module", params=MESHES)
def on_ranks(request):
    parallel = MESHES[request.param]
    return run_distributed(on_mesh, parallel.ranks_per_sequence, request.param)


@pytest.fixture(scope="module")
def single():
    found = {
        (case, documents): figures(case, ParallelConfig(), documents) for case in CASES for documents in (False, True)
    }
    shutdown_distributed()
    return found


@pytest.mark.parametrize("documents", [False, True], ids=["one stream", "documents"])
@pytest.mark.parametrize("case", CASES)
def test_loss_logits_and_every_gradient(case, documents, single, on_ranks):
    loss, logits, gradients = single[case, documents]
    for results in on_ranks:
        found_loss, found_logits, found = results[case, documents]
        assert found_loss == pytest.approx(loss, rel=1e-12)
        if logits is not None:
            torch.testing.assert_close(torch.from_numpy(found_logits), torch.from_numpy(logits), rtol=1e-10, atol=1e-10)
        assert gradients.keys() == found.keys()
        for name, gradient in gradients.items():
            expected = torch.from_numpy(gradient)
            error = (torch.from_numpy(found[name]) - expected).norm() / expected.norm().clamp_min(1e-8)
            assert error < 1e-10, f"{name}: relative error {error:.1e}"


def train_steps(rank, world_size, changes, layouts):
    """Of each layout (loss, gradient norm) of three steps of M3, and the tokens; documents are read apart where no windows are."""
    from megatron.core import parallel_state

    from hope_megatron.engine.new_engine import build_engine
    from hope_megatron.testing.tiny import RepeatingSource, tiny_run_config
    from hope_megatron.training.batches import BatchReader
    from hope_megatron.training.state import TrainingState
    from hope_megatron.training.step import train_step

    found = []
    for layout in layouts:
        config = tiny_run_config(training=changes, num_heads=4, **layout)
        data = config.data.model_copy(update={"reset_at_documents": "truncate_tokens" not in changes})
        config = config.model_copy(update={"data": data})
        engine, state = build_engine(config, init_distributed(config.parallel)), TrainingState()
        with BatchReader(RepeatingSource(), config, engine.mesh) as reader:
            results = [train_step(engine, reader, state, config) for _ in range(3)]
        found.append(([(result.loss, result.grad_norm) for result in results], state.tokens))
        parallel_state.destroy_model_parallel()
    return found


# of four ranks: TP 2 x CP 2, with and without sequence parallelism, and CP 2 x DP 2, over the stages of ZeRO
FOUR = [
    dict(tp=2, cp=2, sequence_parallel=True, zero_stage=1),
    dict(tp=2, cp=2, zero_stage=2),
    dict(tp=2, cp=2, sequence_parallel=True, zero_stage=3),
    dict(cp=2, zero_stage=1),
    dict(cp=2, zero_stage=2),
    dict(cp=2, zero_stage=3),
]


@pytest.mark.parametrize(
    ("changes", "layouts", "world"),
    [({"truncate_tokens": 8}, [dict(cp=2, zero_stage=2)], 2), ({}, FOUR, 4)],
    ids=["windows", "documents on four ranks"],
)
def test_training_equals_one_process(changes, layouts, world):
    expected, tokens = run_distributed(train_steps, 1, changes, [dict(zero_stage=1)])[0][0]
    for results in run_distributed(train_steps, world, changes, layouts, timeout_s=280):
        for (found, count), layout in zip(results, layouts, strict=True):
            assert count == tokens
            torch.testing.assert_close(
                torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-5, atol=0, msg=str(layout)
            )
            torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=3e-4, atol=0, msg=str(layout))
