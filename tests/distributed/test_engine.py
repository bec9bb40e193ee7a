"""The engine computes the same training whatever the ZeRO stage, data-parallel and tensor-parallel size."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from hope_megatron.layers.context_parallel import own_tokens
from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import RepeatingSource, tiny_run_config

NUM_STEPS = 6
MUP_BASE_WIDTH = 16
"""Half the width, so that groups with scaled learning rates take part."""
# (tensor parallel, sequence parallel, ZeRO stage, context parallel) in a world of two; data parallel is what is left.
LAYOUTS = [
    (1, False, 0, 1),
    (1, False, 1, 1),
    (1, False, 2, 1),
    (1, False, 3, 1),
    (2, False, 1, 1),
    (2, True, 0, 1),
    (2, True, 1, 1),
    (2, True, 3, 1),
    (1, False, 0, 2),
    (1, False, 1, 2),
    (1, False, 2, 2),
    (1, False, 3, 2),
]


def global_batch(step):
    """(tokens, targets) [4, 16]; the first row has fewer valid targets than the others, so means of means would be wrong."""
    source = RepeatingSource()
    rows = torch.stack([torch.from_numpy(source.sample(4 * step + i)) for i in range(4)])
    tokens, targets = rows[:, :-1].clone(), rows[:, 1:].clone()
    targets[0, : 5 + step] = -100
    return tokens, targets


def train(config, mesh):
    """Losses and gradient norms of each step, and the held-out sums after the last."""
    from hope_megatron.engine.new_engine import build_engine

    engine = build_engine(config, mesh)
    history = []
    for step in range(NUM_STEPS):
        tokens, targets = global_batch(step)
        valid = (targets != -100).sum()
        mine = range(mesh.data_rank * 4 // mesh.data_size, (mesh.data_rank + 1) * 4 // mesh.data_size)
        rows = [(own_tokens(tokens[i : i + 1], 1), own_tokens(targets[i : i + 1], 1)) for i in mine]
        loss_sum = sum(engine.forward_backward(*row, valid) for row in rows)
        loss = float(engine.sum_over_data_parallel(loss_sum)) / int(valid)
        history.append((loss, engine.step(1.0)))
    tokens, targets = global_batch(99)
    mine = slice(mesh.data_rank * 4 // mesh.data_size, (mesh.data_rank + 1) * 4 // mesh.data_size)
    return engine, history, engine.evaluate(own_tokens(tokens[mine], 1), own_tokens(targets[mine], 1))[0].tolist()


def parameters_of(engine):
    """Master weights of the parameters that this rank holds whole, as lists."""
    from hope_megatron.testing.optim_state import export_state

    state = export_state(engine.optimizer)
    names = [name for name, p in engine.model.named_parameters() if not getattr(p, "tensor_model_parallel", False)]
    return {name: state[name]["fp32"].tolist() for name in names}


def run_layouts(rank, world_size):
    from megatron.core import parallel_state

    from hope_megatron.parallel.distributed import init_distributed

    results = {}
    for tp, sp, zero, cp in LAYOUTS:
        config = tiny_run_config(tp=tp, cp=cp, sequence_parallel=sp, zero_stage=zero, mup_base_width=MUP_BASE_WIDTH)
        mesh = init_distributed(config.parallel)
        engine, history, heldout = train(config, mesh)
        results[tp, sp, zero, cp] = history, heldout, parameters_of(engine), engine.num_parameters
        parallel_state.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def reference():
    """The same training in one process."""
    from hope_megatron.parallel.distributed import init_distributed, shutdown_distributed

    config = tiny_run_config(zero_stage=1, mup_base_width=MUP_BASE_WIDTH)
    engine, history, heldout = train(config, init_distributed(config.parallel))
    yield history, heldout, parameters_of(engine), engine.num_parameters
    shutdown_distributed()


@pytest.fixture(scope="module")
def ranks():
    return run_distributed(run_layouts, 2, timeout_s=300)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{}-sp{:d}-zero{}-cp{}".format(*layout))
def test_layout_equals_single_process(layout, ranks, reference):
    for results in ranks:
        history, heldout, _, num_parameters = results[layout]
        history, expected = torch.tensor(history), torch.tensor(reference[0])
        torch.testing.assert_close(history[0], expected[0], rtol=1e-5, atol=0)  # one gradient: rounding alone
        torch.testing.assert_close(history, expected, rtol=3e-4, atol=0)  # training magnifies it
        torch.testing.assert_close(torch.tensor(heldout), torch.tensor(reference[1]), rtol=3e-4, atol=0)
        assert num_parameters == reference[3]


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout[0] == 2], ids=str)
def test_replicated_parameters_stay_bit_identical_over_tensor_parallel(layout, ranks, reference):
    first, second = (results[layout][2] for results in ranks)
    assert first.keys() == reference[2].keys()
    assert any("norm" in name for name in first)
    for name in first:
        assert first[name] == second[name], name
        torch.testing.assert_close(torch.tensor(first[name]), torch.tensor(reference[2][name]), rtol=1e-2, atol=1e-3)


def refuse_non_finite(rank, world_size):
    """A NaN on one tensor-parallel rank: what each rank raises, and whether its state changed."""
    from hope_megatron.engine.engine import NonFiniteError
    from hope_megatron.engine.new_engine import build_engine
    from hope_megatron.parallel.distributed import init_distributed
    from hope_megatron.testing.optim_state import export_state

    config = tiny_run_config(tp=2, sequence_parallel=True)
    mesh = init_distributed(config.parallel)
    engine = build_engine(config, mesh)

    def step(refuse=False, poison_gradient=False):
        tokens, targets = global_batch(0)
        valid = (targets != -100).sum()
        hook = None
        if poison_gradient and rank == 1:
            hook = engine.model.layers[0].mixer.qkv.weight.register_hook(lambda gradient: gradient * float("nan"))
        for i in range(4):
            engine.forward_backward(tokens[i : i + 1], targets[i : i + 1], valid)
        if hook is not None:
            hook.remove()
        try:
            engine.step(accept=(lambda norm: False) if refuse else None)
        except NonFiniteError as error:
            return str(error)
        return engine.skipped

    assert step() is False
    before = export_state(engine.optimizer)
    messages = [step(poison_gradient=True), step(refuse=True)]
    after = export_state(engine.optimizer)
    unchanged = all(
        torch.equal(before[n]["fp32"], after[n]["fp32"]) and before[n]["step"] == after[n]["step"] for n in before
    )
    return messages, unchanged


@pytest.mark.distributed
def test_non_finite_stops_all_ranks_before_the_update():
    for messages, unchanged in run_distributed(refuse_non_finite, 2):
        assert "gradient norm is NaN or infinite" in messages[0]
        assert messages[1] is True, "a refused step is skipped without an error"
        assert unchanged


def train_bf16(rank, world_size):
    from megatron.core import parallel_state

    from hope_megatron.engine import engine
    from hope_megatron.parallel.distributed import init_distributed

    def history(stage):
        config = tiny_run_config(zero_stage=stage, precision="bf16", mup_base_width=MUP_BASE_WIDTH)
        found = train(config, init_distributed(config.parallel))[1]
        parallel_state.destroy_model_parallel()
        return found

    histories = [history(stage) for stage in (1, 2, 3)]
    with patch.object(engine, "accumulate_together", lambda zero: None):  # DeepSpeed adds one gradient after the other
        return histories, history(1)


@pytest.mark.distributed
def test_bf16_follows_fp32(reference):
    histories, one_by_one = run_distributed(train_bf16, 2)[0]
    assert histories[0] == one_by_one
    for history in histories:
        torch.testing.assert_close(torch.tensor(history)[0], torch.tensor(reference[0])[0], rtol=3e-2, atol=0)
        losses = torch.tensor(history)[:, 0] - torch.tensor(reference[0])[:, 0]
        assert losses.abs().max() < 0.05
