"""M3 and its peers on whole parameters in one process."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hope_megatron.config.optimizers import OPTIMIZERS
from hope_megatron.ops.newton_schulz import newton_schulz
from hope_megatron.optim import (
    M3,
    OptimError,
    UnboundShardError,
    build_optimizer,
    build_param_groups,
)
from hope_megatron.runtime.registry import UnknownNameError

NAMES = list(OPTIMIZERS)


def config(**changes):
    values = {
        "name": "m3", "lr": 1e-2, "vector_lr": None, "betas": (0.9, 0.95), "slow_beta": 0.9, "slow_period_steps": 3,
        "slow_weight": 0.5, "denominator_floor": 0.1, "stagger": True, "eps": 1e-8, "weight_decay": 0.1, "form": "ema",
        "ns_steps": 5, "ns_coefficients": "quintic", "ns_dtype": "float32", "momentum": 0.95, "nesterov": True,
        "delta": 0.1, "inner_lr": 0.5, "inner_decay": 0.99, "inner_objective": "l2", "momentum_output": "identity",
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def tagged(*shape: int, **tags) -> nn.Parameter:
    param = nn.Parameter(torch.randn(*shape))
    for key, value in tags.items():
        setattr(param, key, value)
    return param


def parameters(slow_period: int = 1) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {
        "w": tagged(12, 7),
        "stack": tagged(3, 5, 4),
        "fused": tagged(18, 6, optim_fused_parts=(6, 8, 4)),
        "embedding": tagged(10, 4, optim_role="vector"),
        "bias": tagged(9),
        "slow": tagged(6, 14, update_period_steps=slow_period),
    }


def gradients(params, step: int, scale: float = 1.0):
    generator = torch.Generator().manual_seed(step)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=generator) * scale


def train(params, optimizer, steps, scale: float = 1.0):
    for step in steps:
        gradients(params, step, scale)
        optimizer.step()
    return params


def test_groups_are_split_by_role_period_and_decay_and_ordered():
    params = parameters(slow_period=4)
    params["stack"].no_weight_decay = True
    params["frozen"] = nn.Parameter(torch.zeros(2), requires_grad=False)
    params["tied"] = params["w"]
    groups = build_param_groups(params.items(), config(vector_lr=3e-3))
    assert [g["name"] for g in groups] == ["matrix", "matrix/no_decay", "matrix/period_4", "vector", "vector/no_decay"]
    assert [len(g["params"]) for g in groups] == [2, 1, 1, 1, 1]
    assert [g["lr"] for g in groups] == [1e-2] * 3 + [3e-3] * 2
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0, 0.1, 0.1, 0.0]
    assert params["w"].optim_name == "w"


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"optim_role": "tensor"}, "optim_role is 'tensor'"),
        ({"update_period_steps": 0}, "update_period_steps is 0"),
        ({"tensor_model_parallel": True, "partition_dim": 5}, "partition_dim is 5"),
        ({"optim_fused_parts": (3, 3)}, "do not add up"),
    ],
)
def test_wrong_tags_are_refused_by_name(tags, message):
    params = {"layers.0.w": tagged(4, 4, **tags)}
    with pytest.raises(OptimError, match=rf"layers\.0\.w.*{message}"):
        train(params, build_optimizer(params.items(), config()), [0])


def test_vectors_tagged_as_matrices_are_refused():
    with pytest.raises(OptimError, match="is not a matrix"):
        build_param_groups([("bias", tagged(4, optim_role="matrix"))], config())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sgd"])
@pytest.mark.parametrize("scale", [100.0, 0.01])
def test_scale_of_the_loss_does_not_matter(name, scale):
    expected, scaled = parameters(), parameters()
    train(expected, build_optimizer(expected.items(), config(name=name)), range(20))
    train(scaled, build_optimizer(scaled.items(), config(name=name)), range(20), scale)
    for key, p in expected.items():
        assert (p - scaled[key]).norm() < 1e-3 * p.norm(), key


@pytest.mark.parametrize("scale", [1e-35, 1e-28, 1e-25, 1e-21, 1e-18])
@pytest.mark.parametrize("name", ["m3", "muon", "adamuon", "dgd", "delta_momentum", "dmgd"])
def test_the_smallest_gradients_leave_finite_parameters(name, scale):
    """Squares of gradients below 1e-19 are zero in float32: a matrix may stand still then, and no more than that."""
    params = parameters()
    optimizer = build_optimizer(params.items(), config(name=name))
    train(params, optimizer, range(8), scale)
    assert all(p.isfinite().all() for p in params.values())


def test_paper_form_is_not_scale_free():
    """The literal form divides an orthogonal matrix by the scale of the gradient: why it is not the default."""
    cfg = config(form="paper", lr=1e-4, weight_decay=0.0)
    start = parameters()["w"]
    moved = []
    for scale in (1.0, 0.01):
        params = parameters()
        train(params, build_optimizer(params.items(), cfg), range(20), scale)
        moved.append((params["w"] - start).norm().item())
    assert moved[1] == pytest.approx(100 * moved[0], rel=0.01)


def test_paper_form_is_algorithm_1():
    cfg = config(form="paper", lr=1e-3, weight_decay=0.0)
    w = tagged(6, 9)
    theta, m1, m2, v, o2, chunk = w.detach().clone(), *(torch.zeros(6, 9) for _ in range(5))
    optimizer = build_optimizer([("w", w)], cfg)
    for step in range(1, 8):
        gradients({"w": w}, step)
        g = w.grad.clone()
        optimizer.step()
        m1, v, chunk = m1 + 0.9 * g, v + 0.95 * g * g, chunk + g
        theta = theta - cfg.lr * (newton_schulz(m1) + cfg.slow_weight * o2) / (v.sqrt() + cfg.eps)
        if step % cfg.slow_period_steps == 0:
            m2, chunk = m2 + cfg.slow_beta * chunk, torch.zeros(6, 9)
            o2 = newton_schulz(m2)
        torch.testing.assert_close(w.detach(), theta, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["ema", "paper"])
def test_update_clock_equals_freezing_and_adding_up(name, form):
    """A group of period three moves like one that is frozen for two steps and then given the sum of three gradients (eq. 71)."""
    cfg = config(name=name, form=form, lr=1e-3)
    clocked, frozen = {"w": parameters(slow_period=3)["slow"]}, {"w": parameters()["slow"]}
    optimizer, other = build_optimizer(clocked.items(), cfg), build_optimizer(frozen.items(), cfg)
    start = clocked["w"].detach().clone()
    for step in range(18):
        gradients(clocked, step)
        optimizer.step()
        if step == 1:
            assert torch.equal(clocked["w"], start)
        if step % 3 == 2:
            total = torch.zeros_like(start)
            for k in (step - 2, step - 1, step):
                gradients(frozen, k)
                total += frozen["w"].grad
            frozen["w"].grad = total
            for group in other.param_groups:  # SGD decays, and DGD forgets, for the three steps that it makes at once
                group["weight_decay"] = cfg.weight_decay * (3 if other.grows_with_gradient else 1)
                if name == "dgd":
                    group["delta"] = cfg.delta * (3 if other.grows_with_gradient else 1)
            other.step()
            assert torch.equal(clocked["w"], frozen["w"])


@pytest.mark.parametrize(
    ("name", "form", "factor"),
    [("m3", "ema", 1.0), ("muon", "ema", 1.0), ("adamuon", "ema", 1.0), ("adamw", "ema", 1.0)]
    + [
        ("sgd", "ema", 4.0),
        ("m3", "paper", 0.25),
        ("dmgd", "ema", 1.0),
        ("delta_momentum", "ema", 1.0),
        ("dgd", "ema", 1.0),
    ]
    + [("dgd", "paper", 4.0), ("delta_momentum", "paper", 4.0)],
)
def test_an_update_of_a_period_is_as_long_as_documented(name, form, factor):
    """Four equal gradients: the clocked group's one update against that of a group which gets one of them."""
    cfg = config(name=name, form=form, weight_decay=0.0, eps=1e-20)
    moved = {}
    for period in (1, 4):
        params = {"w": parameters(slow_period=period)["slow"]}
        before = params["w"].detach().clone()
        optimizer = build_optimizer(params.items(), cfg)
        for _ in range(period):
            gradients(params, 0)
            optimizer.step()
        moved[period] = before - params["w"].detach()
    torch.testing.assert_close(moved[4], factor * moved[1], rtol=1e-3, atol=2e-6)  # weights of order 1 in float32


def test_a_clocked_group_has_the_optimum_of_an_unclocked_one():
    """SGD on |w - 1|^2 / 2 with decay 0.5: the optimum is 2/3, whatever the period; without n-fold decay it would be 8/9."""
    for period in (1, 4):
        w = tagged(3, 2)
        w.update_period_steps = period
        optimizer = build_optimizer(
            [("w", w)], config(name="sgd", momentum=0.0, nesterov=False, weight_decay=0.5, lr=0.02)
        )
        for _ in range(1200):
            w.grad = w.detach() - 1
            optimizer.step()
        torch.testing.assert_close(w.detach(), torch.full((3, 2), 2 / 3), rtol=0, atol=1e-4)


def test_flat_vector_that_was_never_bound_is_refused():
    optimizer = build_optimizer(parameters().items(), config())
    flat = nn.Parameter(torch.randn(40))
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.randn(40)
    before = flat.detach().clone()
    with pytest.raises(UnboundShardError, match=r"'matrix' \(w, stack, fused and 1 more\).*bind_zero"):
        optimizer.step()
    assert torch.equal(flat, before)


def test_half_precision_parameters_and_what_is_no_parameter_are_refused():
    half = nn.Parameter(torch.randn(4, 4, dtype=torch.bfloat16))
    optimizer = build_optimizer([("w", half)], config())
    half.grad = torch.randn_like(half)
    with pytest.raises(OptimError, match="bfloat16"):
        optimizer.step()
    with pytest.raises(OptimError, match="takes a module, parameters"):
        M3([torch.randn(4, 4)])
    with pytest.raises(UnknownNameError, match="lion"):
        build_optimizer([("w", tagged(4, 4))], config(name="lion"))


def test_matrices_without_gradient_signal_stand_still():
    """Zero gradients, whole or by rows, must not become NaN or movement."""
    w = tagged(6, 5)
    optimizer = build_optimizer([("w", w)], config(weight_decay=0.0))
    before = w.detach().clone()
    for step in range(7):
        gradients({"w": w}, step)
        w.grad.mul_(0.0 if step < 4 else torch.tensor([1.0, 1, 1, 0, 0, 0]).unsqueeze(1))
        optimizer.step()
    assert w.isfinite().all()
    assert torch.equal(w[3:], before[3:])
    assert not torch.equal(w[:3], before[:3])


@pytest.mark.parametrize("name", ["m3", "muon", "adamuon"])
def test_every_matrix_goes_through_newton_schulz_and_updates_have_the_size_of_adamw(name):
    params = parameters()
    optimizer = build_optimizer(params.items(), config(name=name))
    train(params, optimizer, range(10))
    stats = optimizer.last_step_stats()
    # one plain, three of the stack, three fused parts, one slow: eight matrices
    expected = 80 + (8 * 10 // 3 if name == "m3" else 0)
    assert abs(stats["optim/newton_schulz_calls_total"] - expected) <= 8
    assert 8 <= stats["optim/newton_schulz_calls"] <= 16
    # AdaMuon orthogonalises signs: of a 5 x 4 matrix they may be nearly dependent, which five steps do not mend
    assert 0 < stats["optim/orthogonality_residual"] < (1.0 if name == "adamuon" else 0.6)
    assert stats["optim/exchange_bytes"] == 0
    assert stats["optim/update_rms/matrix"] == pytest.approx(0.2, rel=0.25)


def test_the_residual_is_of_a_matrix_that_the_number_of_updates_picks():
    """So that a resumed run logs the same; and a step without an update logs none."""

    def residuals(params, optimizer, steps):
        train_each = [(train(params, optimizer, [step]), optimizer.last_step_stats())[1] for step in steps]
        return [stats.get("optim/orthogonality_residual") for stats in train_each]

    params = {"stack": tagged(3, 5, 4, update_period_steps=2), "w": tagged(6, 4, update_period_steps=2)}
    undisturbed = build_optimizer(params.items(), config())
    residuals(params, undisturbed, range(3))
    copied = copy.deepcopy(params)
    for name, p in copied.items():
        p.update_period_steps = params[name].update_period_steps
    resumed = build_optimizer(copied.items(), config())
    resumed.load_state_dict(copy.deepcopy(undisturbed.state_dict()))
    logged = residuals(params, undisturbed, range(3, 12))
    assert residuals(copied, resumed, range(3, 12)) == logged
    assert [value is None for value in logged] == [False, True] * 4 + [False]
    assert len(set(logged)) == 6


def test_slow_work_is_spread_over_the_period():
    params = {f"w{i}": tagged(8, 8) for i in range(6)}
    optimizer = build_optimizer(params.items(), config())
    calls = []
    for step in range(9):
        train(params, optimizer, [step])
        calls.append(optimizer.last_step_stats()["optim/newton_schulz_calls"])
    assert calls == [8.0] * 9
    for settings in ({"form": "paper"}, {"stagger": False}):
        together = build_optimizer(params.items(), config(**settings))
        train(params, together, [0, 1])
        assert together.last_step_stats()["optim/newton_schulz_calls"] == 6
        train(params, together, [2])
        assert together.last_step_stats()["optim/newton_schulz_calls"] == 12


def test_a_high_floor_of_the_denominator_leaves_muon_with_two_timescales():
    """Towards infinity M3 without its slow momentum is orthogonalised momentum of RMS 0.2."""
    params = {"w": tagged(12, 7)}
    before = params["w"].detach().clone()
    optimizer = build_optimizer(
        params.items(), config(denominator_floor=1e6, slow_weight=0.0, weight_decay=0.0, lr=1.0)
    )
    gradients(params, 0)
    polar = newton_schulz(params["w"].grad, coefficients="quintic")
    optimizer.step()
    expected = polar * 0.2 / polar.square().mean().sqrt()
    torch.testing.assert_close(before - params["w"].detach(), expected, rtol=1e-4, atol=1e-5)


def test_stack_and_fused_parts_are_orthogonalised_one_by_one():
    params = parameters()
    optimizer = build_optimizer(params.items(), config(name="muon", lr=1.0, weight_decay=0.0))
    before = {key: p.detach().clone() for key, p in params.items()}
    train(params, optimizer, [0])
    for key, matrices in (("stack", 3), ("fused", 3)):
        delta = before[key] - params[key].detach()
        parts = delta.unbind() if key == "stack" else delta.split([6, 8, 4])
        assert len(parts) == matrices
        for part in parts:
            values = torch.linalg.svdvals(part / (0.2 * max(part.shape) ** 0.5))
            assert values.max() < 1.25 and values.min() > 0.3


def test_batches_too_large_for_the_cache_are_cut():
    stack = tagged(3, 64, 8200)  # two of its matrices are more than a batch may have on a CPU
    alone = {f"w{i}": nn.Parameter(w.clone()) for i, w in enumerate(stack.detach())}
    together = build_optimizer([("stack", stack)], config(name="muon"))
    apart = build_optimizer(alone.items(), config(name="muon"))
    gradients({"stack": stack}, 0)
    for p, grad in zip(alone.values(), stack.grad, strict=True):
        p.grad = grad
    together.step()
    apart.step()
    assert together.last_step_stats()["optim/newton_schulz_calls"] == 3
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in alone.values()]), rtol=0, atol=1e-6)


def test_adamw_equals_torch():
    cfg = config(name="adamw", weight_decay=0.1)
    ours, theirs = parameters(), parameters()
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.values() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [theirs["bias"]], "weight_decay": 0.0},
        ],
        lr=cfg.lr, betas=cfg.betas, eps=cfg.eps,
    )  # fmt: skip
    optimizer = build_optimizer(ours.items(), cfg)
    for step in range(10):
        train(ours, optimizer, [step])
        train(theirs, reference, [step])
    for key, p in ours.items():
        torch.testing.assert_close(p, theirs[key], rtol=0, atol=1e-6)


def test_sgd_follows_the_moving_average():
    w = tagged(3, 2)
    optimizer = build_optimizer([("w", w)], config(name="sgd", nesterov=False, weight_decay=0.0))
    expected, average = w.detach().clone(), torch.zeros(3, 2)
    for step in range(4):
        train({"w": w}, optimizer, [step])
        average = 0.95 * average + 0.05 * w.grad
        expected = expected - 1e-2 * average
    torch.testing.assert_close(w.detach(), expected)


def test_adamuon_literally():
    w = tagged(5, 8)
    cfg = config(name="adamuon", nesterov=False, weight_decay=0.0)
    optimizer = build_optimizer([("w", w)], cfg)
    theta, average, v = w.detach().clone(), torch.zeros(5, 8), torch.zeros(5, 8)
    for step in range(5):
        train({"w": w}, optimizer, [step])
        average = 0.95 * average + 0.05 * w.grad
        o = newton_schulz(average.sign())
        v = 0.95 * v + 0.05 * o * o
        update = o / (v.sqrt() + cfg.eps)
        theta = theta - cfg.lr * 0.2 * update * (5 * 8) ** 0.5 / update.norm()
        torch.testing.assert_close(w.detach(), theta, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_least_squares_is_solved(name):
    """A loss that falls: the sign, the scale and the decay of the learning rate hang together."""
    torch.manual_seed(3)
    x, target = torch.randn(64, 10), torch.randn(10, 8)
    w = tagged(10, 8)
    optimizer = build_optimizer([("w", w)], config(name=name, lr=0.3 if name == "sgd" else 0.4, weight_decay=0.0))
    for step in range(200):
        loss = (x @ w - x @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * (1 - step / 200)
        optimizer.step()
    assert loss < 0.05
