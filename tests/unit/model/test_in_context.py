"""Learning in context in one process: against the plain reference in float64, and its reference against finite differences."""

from __future__ import annotations

import pytest
import torch

from hope_megatron.config.model import CMSConfig, CMSLevelConfig, MemoryConfig
from hope_megatron.model import ModelState, build_model
from hope_megatron.model.in_context import InContextError, initial_inner_state
from hope_megatron.model.in_context_reference import learn_reference
from hope_megatron.model.loss import IGNORE
from hope_megatron.testing.models import random_batch, tiny_model

pytestmark = pytest.mark.usefixtures("world_of_one")


@pytest.fixture
def in_float64(monkeypatch):
    """The same program in float64: layers and Megatron-Core's cross entropy ask for at least float32 by `.float()`."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def cms(*levels, **changes):
    """Levels of width 24, 16, ..., each given as (chunk, rate, other settings)."""
    made = []
    for width, (chunk, rate, settings) in zip((24, 16, 8), levels, strict=False):
        made.append(CMSLevelConfig(hidden_size=width, inner_chunk_tokens=chunk, inner_rate=rate, **settings))
    return CMSConfig(levels=tuple(made), **changes)


MOMENTUM = dict(inner_momentum=0.5, inner_weight_decay=0.3)
CASES = {
    "one_level": tiny_model(cms=cms((8, 0.2, {}), activation="gelu")),
    "two_clocks": tiny_model(cms=cms((4, 0.1, MOMENTUM), (16, 0.2, MOMENTUM))),
    "slow_is_static": tiny_model(cms=cms((8, 0.1, {}), (None, 0.0, {}))),
    "decay_to_zero": tiny_model(cms=cms((8, 0.1, MOMENTUM), inner_decay_towards="zero")),
    "independent": tiny_model(cms=cms((4, 0.1, {}), (8, 0.2, MOMENTUM), connection="independent")),
    "nested": tiny_model(cms=cms((4, 0.1, MOMENTUM), (8, 0.2, {}), (16, 0.1, {}), connection="nested")),
    "nested_learned": tiny_model(
        cms=cms(
            (4, 0.1, dict(inner_rate_kind="per_channel") | MOMENTUM),
            (8, 0.2, dict(inner_rate_kind="learned") | MOMENTUM),
            connection="nested",
        )
    ),
    "learned": tiny_model(cms=cms((8, 0.1, dict(inner_rate_kind="learned") | MOMENTUM), (16, 0.1, MOMENTUM))),
    "per_channel": tiny_model(cms=cms((8, 0.1, dict(inner_rate_kind="per_channel") | MOMENTUM))),
    "attention": tiny_model(layer_pattern=("attention", "memory"), cms=cms((8, 0.2, {}), (16, 0.1, {}))),
}


def model_in_float64(config):
    """Livelier than initial weights, so that inner steps are heard."""
    model = build_model(config, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name and parameter.dim() == 2:
                parameter.mul_(5)
            if name.endswith("log_rate"):
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return model


def batch(config, seq_length):
    """Three contexts, with targets that are left out."""
    tokens, targets = random_batch(config, batch_size=3, seq_length=seq_length)
    targets[0, 5:11] = IGNORE
    return tokens, targets


def largest_error(found, expected):
    return max(
        float(((a - b).norm() / b.norm().clamp_min(1e-12)).detach()) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize(
    ("case", "seq_length"), [*((case, 32) for case in CASES), ("two_clocks", 37), ("nested_learned", 37)]
)
def test_losses_and_every_gradient_equal_the_reference(case, seq_length, in_float64):
    model = model_in_float64(CASES[case])
    tokens, targets = batch(CASES[case], seq_length)
    expected, _, _ = learn_reference(model, tokens, targets)
    wanted = torch.autograd.grad(expected.sum(), list(model.parameters()))
    losses = model(tokens, targets, learn=True).losses
    found = torch.autograd.grad(losses.sum(), list(model.parameters()))
    static = model(tokens, targets).losses
    assert losses.dtype == torch.float64
    assert (losses - static)[:, :4].abs().max() < 1e-12  # nothing is learnt in the first segment
    assert (losses - static)[:, 16:].abs().max() > 1e-3
    assert largest_error([losses], [expected]) < 1e-10
    assert largest_error(found, wanted) < 1e-10
    by_name = dict(zip((name for name, _ in model.named_parameters()), found, strict=True))
    assert all(gradient.abs().max() > 0 for name, gradient in by_name.items() if "log_rate" in name)


@pytest.mark.parametrize("case", ["nested_learned", "per_channel", "two_clocks"])
def test_reference_gradient_is_the_derivative_with_inner_gradients_held(case, in_float64):
    """Central differences along a random direction in all parameters and rates at once."""
    model = model_in_float64(CASES[case])
    tokens, targets = batch(CASES[case], 24)
    losses, recorded, _ = learn_reference(model, tokens, targets)
    gradients = torch.autograd.grad(losses.sum(), list(model.parameters()))
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    # the held steps are those of the learnt weights: a shift of the weights shifts the fast ones alike
    sums = []
    for sign in (1, -2):  # to +h, then to -h
        with torch.no_grad():
            for parameter, d in zip(model.parameters(), direction, strict=True):
                parameter.add_(d, alpha=sign * 1e-7)
        sums.append(float(learn_reference(model, tokens, targets, recorded=recorded)[0].detach().sum()))
    assert (sums[0] - sums[1]) / 2e-7 == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("case", ["two_clocks", "nested_learned", "attention"])
def test_truncation_equals_the_reference(case, in_float64):
    """Backward per window, gradients accumulated, as the engine does it."""
    model = model_in_float64(CASES[case])
    tokens, targets = batch(CASES[case], 48)
    expected, _, _ = learn_reference(model, tokens, targets, truncate_tokens=16)
    wanted = torch.autograd.grad(expected.sum(), list(model.parameters()))
    state = None
    for window in range(0, 48, 16):
        piece = slice(window, window + 16)
        output = model(tokens[:, piece], targets[:, piece], state, learn=True, return_state=True)
        output.losses.sum().backward()
        state = output.state
    assert largest_error([p.grad for p in model.parameters()], wanted) < 1e-10


@pytest.mark.parametrize("recompute", ["memory", "layer"])
def test_recomputing_changes_nothing(recompute, in_float64):
    gradients = []
    for kind in ("none", recompute):
        memory = MemoryConfig(chunk_tokens=8, self_chunk_tokens=4, momentum="data")
        config = CASES["learned"].model_copy(update={"memory": memory})
        model = build_model(config, dtype=torch.float64, recompute=kind)
        tokens, targets = batch(config, 32)
        losses = model(tokens, targets, learn=True).losses
        gradients.append(torch.autograd.grad(losses.sum(), list(model.parameters())))
    assert largest_error(gradients[1], gradients[0]) < 1e-10


@pytest.mark.parametrize("case", ["two_clocks", "nested", "attention"])
def test_reading_a_stream_in_pieces_without_gradients(case, in_float64):
    """Pieces of any number of segments, through a saved state, end with what the reference learnt."""
    model = model_in_float64(CASES[case])
    tokens, targets = batch(CASES[case], 48)
    expected, _, ends = learn_reference(model, tokens, targets)
    state, parts = None, []
    with torch.no_grad():
        for piece in (slice(0, 16), slice(16, 24), slice(24, 48)):
            output = model(tokens[:, piece], targets[:, piece], state, learn=True, return_state=True)
            like = model.init_state(3)._replace(inner=initial_inner_state(model, 3))
            state = ModelState.from_tensors(output.state.tensors(), like=like)
            parts.append(output.losses)
    assert largest_error([torch.cat(parts, 1)], [expected]) < 1e-10
    assert largest_learnt_error(state, ends) < 1e-9


@pytest.mark.parametrize("kind", ["constant", "learned", "per_channel"])
def test_inner_rate_zero_is_the_static_model_bit_for_bit(kind):
    static = tiny_model(cms=cms((None, 0.0, {}), (None, 0.0, {})))
    clocked = tiny_model(cms=cms((8, 0.0, dict(inner_rate_kind=kind)), (16, 0.0, {})))
    tokens, targets = batch(static, 32)
    results = []
    for config in (static, clocked):
        model = build_model(config)
        losses = model(tokens, targets, learn=config.cms.learns_in_context).losses
        results.append((losses, torch.autograd.grad(losses.sum(), list(model.parameters()))))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_small_rates_approach_the_static_model():
    tokens, targets = batch(CASES["one_level"], 32)
    static = build_model(CASES["one_level"])(tokens, targets).losses
    for rate, bound in ((1e-3, 1e-2), (1e-6, 1e-5)):
        losses = build_model(tiny_model(cms=cms((8, rate, {}), activation="gelu")))(tokens, targets, learn=True).losses
        assert (losses - static).abs().max() < bound


def test_contexts_of_a_batch_do_not_see_each_other():
    config = CASES["two_clocks"]
    model = build_model(config)
    tokens, targets = batch(config, 32)
    with torch.no_grad():
        together = model(tokens, targets, learn=True).losses
        alone = torch.cat([model(tokens[i : i + 1], targets[i : i + 1], learn=True).losses for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_state_has_one_size_at_any_length():
    model = build_model(CASES["nested"])
    tokens, targets = random_batch(CASES["nested"], seq_length=128)
    with torch.no_grad():
        short = model(tokens[:, :16], targets[:, :16], learn=True, return_state=True).state
        long = model(tokens, targets, learn=True, return_state=True).state
    assert short.num_bytes() == long.num_bytes()


def in_pieces(model, tokens, targets, lengths, *, flush=False):
    """Losses and the state at the end of a stream that is cut into pieces, its state saved in between."""
    state, parts, at = None, [], 0
    for length in lengths:
        piece, end = slice(at, at + length), at + length == tokens.size(1)
        output = model(tokens[:, piece], targets[:, piece], state, learn=True, return_state=True, flush=flush and end)
        like = model.init_state(tokens.size(0))._replace(inner=initial_inner_state(model, tokens.size(0)))
        state, at = ModelState.from_tensors(output.state.tensors(), like=like), at + length
        parts.append(output.losses)
    assert at == tokens.size(1)
    return torch.cat(parts, 1), state


CUTS = ([2] * 15, [1] * 30, [3, 5, 1, 21], [7, 23], [30], [4, 1, 3, 22])


@pytest.mark.parametrize("outer", [False, True], ids=["reading", "training"])
@pytest.mark.parametrize("case", ["two_clocks", "nested", "independent", "attention"])
def test_any_cut_of_a_stream_learns_the_same(case, outer, in_float64):
    model = model_in_float64(CASES[case])
    tokens, targets = batch(CASES[case], 30)
    expected, _, ends = learn_reference(model, tokens, targets)
    with torch.set_grad_enabled(outer):
        for lengths in CUTS:
            losses, state = in_pieces(model, tokens, targets, lengths)
            assert largest_error([losses], [expected]) < 1e-10, lengths
            rest = 30 % CASES[case].cms.inner_segment_tokens
            assert state.inner.position == 30 and state.inner.unlearnt.tokens.size(1) == rest
            assert largest_learnt_error(state, ends) < 1e-9, lengths


def largest_learnt_error(state, ends) -> float:
    found = 0.0
    for row, end in enumerate(ends):
        for name, delta in end.items():
            _, layer, _, _, level, part, _ = name.split(".")
            learnt = getattr(state.inner.layers[int(layer)][int(level)].delta, part)[row]
            found = max(found, largest_error([learnt], [delta]))
    return found


@pytest.mark.parametrize("length", [4, 20, 30, 32])
@pytest.mark.parametrize("case", ["two_clocks", "nested", "nested_learned", "decay_to_zero"])
def test_a_flush_learns_the_rest_of_every_chunk(case, length, in_float64):
    model = model_in_float64(CASES[case])
    tokens, targets = batch(CASES[case], length)
    expected, _, ends = learn_reference(model, tokens, targets, flush=True)
    with torch.no_grad():
        for lengths in ([length], [3, length - 3], [length - 1, 1]):
            losses, state = in_pieces(model, tokens, targets, lengths, flush=True)
            assert largest_error([losses], [expected]) < 1e-10
            assert largest_learnt_error(state, ends) < 1e-9
            assert state.inner.position == 0 and state.inner.unlearnt is None
        # nothing is learnt twice, and an empty piece can end a stream
        _, state = in_pieces(model, tokens, targets, [length])
        empty = tokens[:, :0]
        for _ in range(2):
            state = model(empty, empty, state, learn=True, return_state=True, flush=True).state
            assert largest_learnt_error(state, ends) < 1e-9


def test_a_flush_is_a_tick_of_a_clock_that_stands_there(in_float64):
    """Five tokens of a chunk of eight, flushed, and five of a chunk of five: the same weights."""
    ends = []
    for chunk in (8, 5):
        model = model_in_float64(tiny_model(cms=cms((chunk, 0.2, MOMENTUM), activation="gelu")))
        tokens, targets = batch(model.model_config, 5)
        with torch.no_grad():
            ends.append(model(tokens, targets, learn=True, return_state=True, flush=True).state.inner.layers)
    for flushed, ticked in zip(*ends):
        assert flushed[0].delta.up.abs().max() > 1e-4
        assert torch.equal(flushed[0].delta.up, ticked[0].delta.up)
        assert torch.equal(flushed[0].momentum.down, ticked[0].momentum.down)


def test_a_rest_that_was_read_on_without_learning_is_let_go():
    model = build_model(CASES["one_level"])
    tokens, targets = random_batch(CASES["one_level"], seq_length=21)
    with torch.no_grad():
        state = model(tokens[:, :11], targets[:, :11], learn=True, return_state=True).state
        static = model(tokens[:, 11:16], state=state, return_state=True)
        assert static.state.inner.position == 8 and static.state.inner.unlearnt is None
        whole = model(tokens[:, 8:16], state=model(tokens[:, :8], targets[:, :8], learn=True, return_state=True).state)
    torch.testing.assert_close(static.logits, whole.logits[:, 3:], atol=1e-5, rtol=0)


def test_a_model_without_clocks_is_refused():
    model = build_model(tiny_model(memory=MemoryConfig(chunk_tokens=8)))
    with pytest.raises(InContextError, match="no clock inside the context"):
        model(*random_batch(model.model_config), learn=True)


def test_bfloat16_follows_float32():
    """Steps far below the weights' own resolution are kept: the difference to the learnt weights is float32."""
    tokens, targets = batch(CASES["learned"], 32)
    models = [build_model(CASES["learned"], dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    outputs = [model(tokens, targets, learn=True, return_state=True) for model in models]
    torch.testing.assert_close(outputs[1].losses, outputs[0].losses, rtol=0, atol=0.05)
    for output in outputs:
        output.losses.mean().backward()
    found, expected = (torch.cat([p.grad.float().flatten() for p in model.parameters()]) for model in models)
    assert (found - expected).norm() < 0.25 * expected.norm()  # 0.16 without learning
    for levels in outputs[1].state.inner.layers:
        assert all(level.delta.up.dtype == torch.float32 and level.delta.up.any() for level in levels)
