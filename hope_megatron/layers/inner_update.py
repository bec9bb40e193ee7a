"""What a level of the continuum memory system learns inside a context: its state, and the step of its clock.

Per context and level, with C its chunk length in tokens (eq. 71, next-token loss L summed over the chunk):

    g_n = dL(chunk n) / dW at the fast weights W_n, gathered over the segments of the chunk
    m_n = mu m_{n-1} + g_n
    W_{n+1} = W_n - eta (m_n + lambda (W_n - anchor))         anchor: the start, or 0

Nested (eq. 72): when the next slower clock ticks, with eta' its rate and G the gradient since its last tick,

    S <- S - eta' (G + lambda' (S - W_learnt)),   W <- S,   m <- 0

What is kept is the difference to the learnt weights, in float32: nothing learnt in context is exactly the static level, and
bf16 weights do not swallow small steps. Inner gradients are constants to the outer gradient (first order); rates are not.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from hope_megatron.config.model import CMSConfig, CMSLevelConfig
from hope_megatron.layers.continuum_mlp import CMSLevel, FastWeights


class LevelState(NamedTuple):
    """A level in the middle of its contexts. All but `delta` are there only where the configuration needs them."""

    delta: FastWeights
    """Fast weights minus the learnt ones."""
    gradient: FastWeights | None
    """Gathered since the last tick; None if the level ticks after every segment."""
    momentum: FastWeights | None
    start: FastWeights | None
    """Nested: where the fast weights start anew, minus the learnt ones."""
    start_gradient: FastWeights | None
    """Nested: gathered since the next slower clock ticked."""


class Clock(NamedTuple):
    """A level's inner clock, and the next slower one if it governs where this level starts (nested)."""

    config: CMSLevelConfig
    decay_to_zero: bool
    every_segment: bool
    """The level ticks after every segment."""
    slower: int | None
    """Index of the level that learns this one's start."""


def inner_clocks(cms: CMSConfig) -> tuple[Clock | None, ...]:
    """The clock of each level; None where a level is static."""
    ticking = [i for i, level in enumerate(cms.levels) if level.ticks]
    slower = dict(itertools.pairwise(ticking)) if cms.connection == "nested" else {}
    return tuple(
        Clock(
            level,
            cms.inner_decay_towards == "zero",
            level.inner_chunk_tokens == cms.inner_segment_tokens,
            slower.get(i),
        )
        if level.ticks
        else None
        for i, level in enumerate(cms.levels)
    )


def initial_level_state(level: CMSLevel, clock: Clock, batch_size: int) -> LevelState:
    """A level of `batch_size` contexts that have learnt nothing."""

    def nothing(wanted: bool) -> FastWeights | None:
        if not wanted:
            return None
        weights = (level.up.weight, level.down.weight)
        dtypes = (torch.promote_types(w.dtype, torch.float32) for w in weights)
        return FastWeights(*(w.new_zeros(batch_size, *w.shape, dtype=d) for w, d in zip(weights, dtypes)))

    nested = clock.slower is not None
    delta = nothing(True)
    assert delta is not None
    return LevelState(
        delta,
        nothing(not clock.every_segment),
        nothing(clock.config.inner_momentum > 0),
        nothing(nested),
        nothing(nested),
    )


def adapted_weights(level: CMSLevel, state: LevelState) -> FastWeights:
    """The fast weights [B, ...] in the level's dtype; differentiable in the learnt ones, and in the rates so far."""
    learnt = (level.up.weight, level.down.weight)
    return FastWeights(*((w.to(d.dtype) + d).to(w.dtype) for w, d in zip(learnt, state.delta)))


def step_level(
    levels: list[CMSLevel],
    index: int,
    clocks: tuple[Clock | None, ...],
    state: LevelState,
    new: FastWeights,
    position: int,
    *,
    flush: bool = False,
) -> LevelState:
    """Take the gradient of one more segment in, and let the clocks tick that stand at `position`.

    Args:
        levels: those of the layer; `index` is the one that is stepped.
        clocks: see `inner_clocks`.
        state: before the segment.
        new: gradient of the segment's loss by the fast weights [B, ...]; no graph.
        position: tokens of the context read so far, a border of segments.
        flush: `position` is the end of the stream, anywhere. The clocks tick that do not stand there: they have gathered something.
    """
    due = lambda level: (position % (level.inner_chunk_tokens or 1) == 0) != flush  # noqa: E731
    level, clock = levels[index], clocks[index]
    assert clock is not None
    new = FastWeights(*(g.to(d.dtype) for g, d in zip(new, state.delta)))
    gathered = new if state.gradient is None else _map(torch.add, state.gradient, new)
    state = state._replace(gradient=None if state.gradient is None else gathered)
    if due(clock.config):
        state = _tick(level, clock, state, gathered)
    slower = None if clock.slower is None else clocks[clock.slower]
    if slower is not None and clock.slower is not None:
        assert state.start_gradient is not None
        state = state._replace(start_gradient=_map(torch.add, state.start_gradient, new))
        if due(slower.config):
            state = _restart(level, levels[clock.slower], slower, state)
    return state


def _tick(level: CMSLevel, clock: Clock, state: LevelState, gradient: FastWeights) -> LevelState:
    """One step of the fast weights."""
    config, momentum = clock.config, state.momentum
    if momentum is not None:
        momentum = gradient = _map(lambda m, g: config.inner_momentum * m + g, momentum, gradient)
    delta = _step(level, level, clock, state.delta, gradient, state.start)
    cleared = None if state.gradient is None else _map(torch.zeros_like, state.gradient)
    return state._replace(delta=delta, gradient=cleared, momentum=momentum)


def _restart(level: CMSLevel, slower_level: CMSLevel, slower: Clock, state: LevelState) -> LevelState:
    """A context of the level is over: its start takes a step at the slower clock, and the level starts anew there."""
    assert state.start is not None and state.start_gradient is not None
    start = _step(level, slower_level, slower, state.start, state.start_gradient, None)
    momentum = None if state.momentum is None else _map(torch.zeros_like, state.momentum)
    cleared = _map(torch.zeros_like, state.start_gradient)
    return state._replace(delta=start, start=start, start_gradient=cleared, momentum=momentum)


def _step(
    level: CMSLevel,
    rate_of: CMSLevel,
    clock: Clock,
    delta: FastWeights,
    direction: FastWeights,
    start: FastWeights | None,
) -> FastWeights:
    """delta - eta (direction + lambda (weights - anchor)), with the rate of the level `rate_of`."""
    config = clock.config
    if config.inner_weight_decay > 0:
        excess = delta if start is None else _map(torch.sub, delta, start)
        if clock.decay_to_zero:
            learnt = FastWeights(level.up.weight, level.down.weight)
            excess = _map(lambda d, w: d + w.detach().to(d.dtype), delta, learnt)
        direction = _map(lambda g, x: g + config.inner_weight_decay * x, direction, excess)
    factors = rate_of.rate_factors()
    if factors is None:
        return _map(lambda d, g: torch.sub(d, g, alpha=config.inner_rate), delta, direction)
    rates = FastWeights(*(config.inner_rate * factor for factor in factors))
    return _map(lambda d, g, r: d - r.to(d.dtype) * g, delta, direction, rates)


def _map(fn, *trees: FastWeights) -> FastWeights:
    """fn on `up` of all, fn on `down` of all."""
    return FastWeights(*(fn(*tensors) for tensors in zip(*trees, strict=True)))
