"""Learning in context computes the same under tensor, sequence and context parallelism, and under ZeRO."""

from __future__ import annotations

import functools

import pytest
import torch

from hope_megatron.config.model import AttentionConfig, CMSConfig, CMSLevelConfig
from hope_megatron.config.parallel import ParallelConfig, own_spans
from hope_megatron.model import build_model
from hope_megatron.model.in_context_reference import learn_reference
from hope_megatron.parallel.distributed import init_distributed, shutdown_distributed
from hope_megatron.parallel.sequence_parallel import reduce_sequence_parallel_gradients
from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.models import random_batch, tiny_model
from hope_megatron.testing.tiny import RepeatingSource, tiny_run_config
from hope_megatron.training.batches import mesh_spans

pytestmark = pytest.mark.distributed

SEQ_LENGTH = 36
"""Four tokens more than whole chunks of the slow level."""
STEP = dict(inner_momentum=0.5, inner_weight_decay=0.3)


def cms(connection, fast_kind, slow_kind, **changes):
    return CMSConfig(
        levels=(
            CMSLevelConfig(
                hidden_size=24, inner_chunk_tokens=4, inner_rate=0.1, inner_rate_kind=fast_kind, **STEP, **changes
            ),
            CMSLevelConfig(
                hidden_size=16, inner_chunk_tokens=8, inner_rate=0.1, inner_rate_kind=slow_kind, update_period_steps=2
            ),
        ),
        connection=connection,
    )


MODELS = {
    "sequential": tiny_model(cms=cms("sequential", "per_channel", "learned")),
    "nested": tiny_model(cms=cms("nested", "per_channel", "learned")),
    "independent": tiny_model(
        layer_pattern=("attention", "memory"),
        attention=AttentionConfig(num_kv_heads=2),
        cms=cms("independent", "learned", "constant"),
    ),
}


def losses_and_gradients(config, parallel, learn):
    """Losses of every token and the full gradient of every parameter, assembled over the mesh; in float64."""
    mesh = init_distributed(parallel)
    model = build_model(config, parallel, dtype=torch.float64)
    reduce_sequence_parallel_gradients(model, mesh.tp_group)
    tokens, targets = random_batch(config, seq_length=SEQ_LENGTH)
    spans = own_spans(SEQ_LENGTH, config.cms.inner_segment_tokens, mesh.cp_rank, mesh.cp_size)
    losses = learn(model, cut(tokens, spans), cut(targets, spans))
    (losses.sum() / tokens.numel()).backward()
    everywhere = losses.new_zeros(tokens.shape)
    for span, part in zip(spans, losses.detach().split([stop - first for first, stop in spans], 1), strict=True):
        everywhere[:, slice(*span)] = part
    torch.distributed.all_reduce(everywhere, group=mesh.dp_group)
    gradients = {}
    for name, p in model.named_parameters():
        grad = p.grad.contiguous()
        torch.distributed.all_reduce(grad, group=mesh.dp_group)
        if p.tensor_model_parallel and mesh.tp_size > 1:
            parts = [torch.empty_like(grad) for _ in range(mesh.tp_size)]
            torch.distributed.all_gather(parts, grad.contiguous(), group=mesh.tp_group)
            blocks = [part.chunk(p.partition_stride, p.partition_dim) for part in parts]
            grad = torch.cat([block[i] for i in range(p.partition_stride) for block in blocks], p.partition_dim)
        gradients[name] = grad.clone().numpy()
    return everywhere.numpy(), gradients


def cut(tokens, spans):
    return torch.cat([tokens[:, slice(*span)] for span in spans], 1)


MESHES = {
    "tensor parallel": ParallelConfig(tensor_parallel=2),
    "sequence parallel": ParallelConfig(tensor_parallel=2, sequence_parallel=True),
    "context parallel": ParallelConfig(context_parallel=2),
}
MESHES_OF_FOUR = {
    "tensor, sequence and context parallel": ParallelConfig(
        tensor_parallel=2, sequence_parallel=True, context_parallel=2
    ),
}


def on_ranks(rank, world_size, meshes, names):
    from megatron.core import parallel_state

    learn = lambda model, x, y: model(x, y, learn=True).losses  # noqa: E731
    results = {}
    for mesh, parallel in meshes.items():
        for name in names:
            results[name, mesh] = losses_and_gradients(MODELS[name], parallel, learn)
        if mesh != "tensor parallel":
            parallel_state.destroy_model_parallel()
    return results


@pytest.mark.parametrize(
    ("world_size", "meshes", "names"),
    [
        (2, MESHES, tuple(MODELS)),
        (4, MESHES_OF_FOUR, ("sequential", "nested")),
    ],  # a key-value head cannot be halved twice
    ids=["two ranks", "four ranks"],
)
def test_losses_and_every_gradient(world_size, meshes, names):
    """Against the plain reference on one rank."""
    learn = lambda model, x, y: learn_reference(model, x, y)[0]  # noqa: E731
    expected = {name: losses_and_gradients(MODELS[name], ParallelConfig(), learn) for name in names}
    shutdown_distributed()
    for results in run_distributed(on_ranks, world_size, meshes, names):
        for (name, mesh), (losses, gradients) in results.items():
            wanted_losses, wanted = expected[name]
            torch.testing.assert_close(
                torch.from_numpy(losses), torch.from_numpy(wanted_losses), rtol=1e-10, atol=1e-10
            )
            assert gradients.keys() == wanted.keys()
            for parameter, gradient in wanted.items():
                gradient, found = torch.from_numpy(gradient), torch.from_numpy(gradients[parameter])
                error = (found - gradient).norm() / gradient.norm().clamp_min(1e-8)
                assert error < 1e-10, f"{name} {mesh} {parameter}: relative error {error:.1e}"


# (tensor parallel, sequence parallel, ZeRO stage, context parallel) in a world of two
LAYOUTS = [(1, False, 1, 1), (1, False, 2, 1), (2, True, 1, 1), (2, True, 2, 1), (1, False, 2, 2)]
STEPS = 2


def run_config(tp, sp, zero, cp=1):
    """Truncated every 16 of 32 tokens, which are four and two chunks of the levels."""
    return tiny_run_config(
        tp=tp,
        cp=cp,
        sequence_parallel=sp,
        zero_stage=zero,
        cms=cms("sequential", "per_channel", "learned"),
        training={"truncate_tokens": 16, "seq_length": 32},
    )


def global_batch(step):
    """(tokens, targets) [4, 32]; the first row has fewer valid targets than the others."""
    source = RepeatingSource(seq_length=32)
    rows = torch.stack([torch.from_numpy(source.sample(4 * step + i)) for i in range(4)])
    tokens, targets = rows[:, :-1].clone(), rows[:, 1:].clone()
    targets[0, : 5 + step] = -100
    return tokens, targets


def train(config):
    """(loss, gradient norm) of each step; and the learned rates after the last."""
    from hope_megatron.engine.new_engine import build_engine

    mesh = init_distributed(config.parallel)
    engine = build_engine(config, mesh)
    own = functools.partial(cut, spans=mesh_spans(config, mesh, training=True))
    history = []
    for step in range(STEPS):
        tokens, targets = global_batch(step)
        valid = (targets != -100).sum()
        mine = range(mesh.data_rank * 4 // mesh.data_size, (mesh.data_rank + 1) * 4 // mesh.data_size)
        rows = [(own(tokens[i : i + 1]), own(targets[i : i + 1])) for i in mine]
        loss_sum = sum(engine.forward_backward(*row, valid) for row in rows)
        history.append((float(engine.sum_over_data_parallel(loss_sum)) / int(valid), engine.step(1.0)))
    rates = {
        name: p.detach().tolist()
        for name, p in engine.model.named_parameters()
        if name.endswith("levels.1.log_rate")  # replicated over tensor parallelism
    }
    tokens, targets = global_batch(99)
    mine = slice(mesh.data_rank * 4 // mesh.data_size, (mesh.data_rank + 1) * 4 // mesh.data_size)
    return history, rates, engine.evaluate(own(tokens[mine]), own(targets[mine]))[0].tolist()


def run_layouts(rank, world_size):
    from megatron.core import parallel_state

    results = {}
    for layout in LAYOUTS:
        results[layout] = train(run_config(*layout))
        parallel_state.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def ranks():
    return run_distributed(run_layouts, 2, timeout_s=300)


@pytest.fixture(scope="module")
def single():
    """The same training in one process, after its first gradient has been compared with the plain reference."""
    config = run_config(1, False, 1)
    history, rates, heldout = train(config)
    model = build_model(config.model, seed=config.training.seed)
    tokens, targets = global_batch(0)
    valid = (targets != -100).sum()
    loss = learn_reference(model, tokens, targets, truncate_tokens=16)[0].sum() / valid
    norm = torch.stack([g.norm() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm()
    shutdown_distributed()
    torch.testing.assert_close(torch.tensor(history[0]), torch.stack([loss.detach(), norm]), rtol=1e-5, atol=0)
    return history, rates, heldout


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{}-sp{:d}-zero{}-cp{}".format(*layout))
def test_training_equals_a_single_process(layout, ranks, single):
    for results in ranks:
        history, rates, heldout = results[layout]
        torch.testing.assert_close(torch.tensor(history[0]), torch.tensor(single[0][0]), rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.tensor(history), torch.tensor(single[0]), rtol=3e-4, atol=0)
        torch.testing.assert_close(torch.tensor(heldout), torch.tensor(single[2]), rtol=3e-4, atol=0)
        assert rates.keys() == single[1].keys() and len(rates) == 2
        for name, rate in rates.items():
            assert abs(rate[0]) > 1e-4  # learnt
            assert rate == pytest.approx(single[1][name], rel=1e-3)
