"""Learning in context (eq. 71): a context is read chunk after chunk, and the fast copies of the CMS weights learn from each.

A segment is the span between two ticks of the fastest inner clock. It is read at the fast weights as they stand; the gradient
of its next-token losses by these weights, with the memories' states at its start taken as constants, goes to the clocks.
Every context of the batch has fast weights of its own. Where gradients are wanted, the outer one is taken at the fast
weights (first order) and flows through the memories' states from segment to segment; inner gradients are constants to it.
`in_context_reference.py` says the same plainly.

Under context parallelism each segment is split over the ranks of a sequence, so that all read at the same fast weights. Each finds
what its tokens say of the gradient, and their sum goes to the clocks: the same on all ranks, as are the fast weights.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hope_megatron.config.model import ModelConfig
from hope_megatron.layers.context_parallel import context_parallel_size, sum_over_tokens
from hope_megatron.layers.continuum_mlp import FastLevels, FastWeights
from hope_megatron.layers.inner_update import (
    LevelState,
    adapted_weights,
    initial_level_state,
    inner_clocks,
    step_level,
)
from hope_megatron.model.state import InnerState, ModelState, Unlearnt

FastModel = tuple[FastLevels, ...]
"""Fast weights by layer and level."""


class LearningModel(Protocol):
    """What learning in context needs of a model; `LanguageModel` is one."""

    model_config: ModelConfig
    layers: nn.ModuleList

    def init_state(self, batch_size: int) -> ModelState:
        """The state of streams of which nothing has been read."""
        ...

    def read(self, tokens: Tensor, states: tuple[Any, ...] | None, fast: FastModel | None) -> tuple[Tensor, Any]:
        """Logits of tokens [B, T], and the mixers' states after them."""
        ...

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Losses [B, T] of logits, which are used up."""
        ...


class InContextError(ValueError):
    """A piece of a stream that cannot be learnt from. The message names the values and the remedy."""

    is_user_error = True


def initial_inner_state(model: LearningModel, batch_size: int) -> InnerState:
    """The state of `batch_size` contexts from which nothing has been learnt."""
    clocks = inner_clocks(model.model_config.cms)
    if not any(clocks):
        raise InContextError(
            "this model has no clock inside the context, so it cannot learn from what it reads; give one of its CMS levels "
            "inner_chunk_tokens and inner_rate, for example levels.0.inner_chunk_tokens=64 levels.0.inner_rate=0.01"
        )
    layers = (
        tuple(
            initial_level_state(level, clock, batch_size) if clock else None
            for level, clock in zip(layer.mlp.levels, clocks, strict=True)
        )
        for layer in model.layers
    )
    return InnerState(tuple(layers), 0)


def set_inner_clocks(model: LearningModel, config: ModelConfig) -> None:
    """Give a built model, of any kind, other clocks: those of `config`, which must be its configuration otherwise.

    Its matrices are the levels' starts, so nothing needs retraining. Rates are constants, but for factors it has learnt.
    """
    model.model_config = config


def fast_weights(model: LearningModel, inner: InnerState | None) -> FastModel | None:
    """The weights that streams have come to; None where nothing was learnt."""
    return None if inner is None else _adapted(model, inner)


def _adapted(model: LearningModel, inner: InnerState) -> FastModel:
    return tuple(
        tuple(
            adapted_weights(level, state) if state is not None else None
            for level, state in zip(layer.mlp.levels, states, strict=True)
        )
        for layer, states in zip(model.layers, inner.layers, strict=True)
    )


def read_and_learn(
    model: LearningModel,
    tokens: Tensor,
    targets: Tensor,
    state: ModelState | None = None,
    *,
    return_state: bool = False,
    flush: bool = False,
) -> tuple[Tensor, ModelState | None]:
    """Read a piece of each stream, learning from it. However a stream is cut into pieces, the same is learnt.

    A piece may end inside a segment: the state then keeps its tokens, and where they began. When the segment is full it is read
    once more, as a whole, and learnt from.

    Args:
        tokens: [B, T] int64. Under context parallelism this rank's slice of each segment, one after the other.
        targets: [B, T] int64, the next tokens, or IGNORE: read, but not learnt from.
        state: where the streams stand; None begins new ones.
        return_state: also return where they stand now, cut from the graph.
        flush: the streams end here. The rest that fills no segment is learnt from as well, every clock that has gathered gradients
            since it last ticked ticks, and the clocks begin anew.

    Returns:
        Losses [B, T], each at the weights before its segment was learnt from; and the state if wanted.

    Raises:
        InContextError: the model has no inner clock; or, under context parallelism, the piece ends inside a segment and is to be
            gone on from.
    """
    inner = state.inner if state is not None else None
    inner = initial_inner_state(model, tokens.size(0)) if inner is None else inner
    mixers: tuple[Any, ...] | None = state.layers if state is not None else None
    segment, rest = _slice_tokens(model), inner.unlearnt
    num_before = 0 if rest is None else rest.tokens.size(1)
    if rest is not None and num_before + tokens.size(1) < segment and not flush:
        logits, mixers = model.read(tokens, mixers, _adapted(model, inner))
        inner = inner._replace(position=inner.position + tokens.size(1), unlearnt=_longer(rest, tokens, targets))
        return model.losses(logits, targets), ModelState(mixers, inner).detach() if return_state else None
    if rest is not None:
        longer = _longer(rest, tokens, targets)
        mixers, tokens, targets = rest.layers, longer.tokens, longer.targets
        inner = inner.without_rest()
    losses, mixers, inner = _read_segments(
        model, tokens, targets, mixers, inner, return_state=return_state, flush=flush
    )
    end = ModelState(mixers or (), inner).detach() if return_state else None
    return torch.cat(losses, 1)[:, num_before:] if losses else tokens.new_zeros(tokens.shape, dtype=torch.float32), end


def _read_segments(
    model: LearningModel,
    tokens: Tensor,
    targets: Tensor,
    mixers: Any,
    inner: InnerState,
    *,
    return_state: bool,
    flush: bool,
) -> tuple[list[Tensor], Any, InnerState]:
    """`read_and_learn` of streams that stand at a border of segments: losses by segment, and where they stand now."""
    outer, segment = torch.is_grad_enabled(), _slice_tokens(model)
    if return_state and not flush and tokens.size(1) % segment and context_parallel_size() > 1:
        raise InContextError(
            "a piece that ends inside a segment cannot be gone on from under parallel.context_parallel, because the whole segment "
            f"is cut elsewhere; read multiples of {model.model_config.cms.inner_segment_tokens} tokens"
        )
    fast, losses = _adapted(model, inner), []
    num_tokens = tokens.size(1)
    for first in range(0, num_tokens, segment):
        full, last = first + segment <= num_tokens, first + segment >= num_tokens
        learns = (full or flush) and (return_state or not last)
        piece = slice(first, first + segment)
        # a fresh view, so that the inner gradient knows this segment only, though slow levels keep their weights for several
        here, before = _views(fast, needs_grad=learns), mixers
        with torch.set_grad_enabled(outer or learns):
            logits, mixers = model.read(tokens[:, piece], mixers, here)
            gradients = None
            if learns and outer:
                # the cross entropy and its backward work in place, so the inner loss has a copy of the logits
                inner_losses = model.losses(logits.clone(), targets[:, piece])
                gradients = _gradients(inner_losses, here, keep_graph=True)
            losses.append(model.losses(logits, targets[:, piece]))
            if learns and not outer:
                gradients = _gradients(losses[-1], here, keep_graph=False)
        if not outer:
            losses[-1], mixers = losses[-1].detach(), ModelState(mixers).detach().layers
        position = inner.position + tokens[:, piece].size(1) * context_parallel_size()
        if gradients is not None:
            inner, fast = _step(model, inner, fast, gradients, position, flush=not full)
        elif return_state:
            before = model.init_state(tokens.size(0)).layers if before is None else before
            inner = inner._replace(position=position, unlearnt=Unlearnt(before, tokens[:, piece], targets[:, piece]))
    if flush and return_state:
        inner = _end_clocks(model, inner, fast, ticked=num_tokens % segment > 0)
        mixers = model.init_state(tokens.size(0)).layers if mixers is None else mixers
    return losses, mixers, inner


def _slice_tokens(model: LearningModel) -> int:
    """Tokens of a segment that this rank reads."""
    return model.model_config.cms.inner_segment_tokens // context_parallel_size()


def _longer(rest: Unlearnt, tokens: Tensor, targets: Tensor) -> Unlearnt:
    joined = (torch.cat(pair, 1) for pair in ((rest.tokens, tokens), (rest.targets, targets)))
    return Unlearnt(rest.layers, *joined)


def _end_clocks(model: LearningModel, inner: InnerState, fast: FastModel, *, ticked: bool) -> InnerState:
    """The clocks begin anew; before that those tick that still hold gradients, unless they just did."""
    if not ticked:
        nothing = tuple(
            tuple(None if w is None else FastWeights(*map(torch.zeros_like, w)) for w in levels) for levels in fast
        )
        inner, _ = _step(model, inner, fast, nothing, inner.position, flush=True)
    return inner._replace(position=0)


def _views(fast: FastModel, needs_grad: bool) -> FastModel:
    """The same weights as new nodes of the graph."""

    def view(weight: Tensor) -> Tensor:
        weight = weight.view_as(weight) if weight.requires_grad and torch.is_grad_enabled() else weight.detach()
        return weight if weight.requires_grad or not needs_grad else weight.requires_grad_()

    return tuple(tuple(None if w is None else FastWeights(view(w.up), view(w.down)) for w in levels) for levels in fast)


def _gradients(losses: Tensor, fast: FastModel, *, keep_graph: bool) -> FastModel:
    """Gradient of each context's summed losses, over all its ranks, by its own fast weights."""
    flat = [w for levels in fast for weights in levels if weights is not None for w in weights]
    found = iter(sum_over_tokens(list(torch.autograd.grad(losses.sum(), flat, retain_graph=keep_graph))))
    return tuple(
        tuple(None if weights is None else FastWeights(next(found), next(found)) for weights in levels)
        for levels in fast
    )


def _step(
    model: LearningModel,
    inner: InnerState,
    fast: FastModel,
    gradients: FastModel,
    position: int,
    *,
    flush: bool = False,
) -> tuple[InnerState, FastModel]:
    """Give every level its gradient; where a clock ticked, the weights are made anew."""
    clocks = inner_clocks(model.model_config.cms)
    states: list[tuple[LevelState | None, ...]] = []
    weights: list[FastLevels] = []
    for layer, old_states, old_weights, news in zip(model.layers, inner.layers, fast, gradients, strict=True):
        levels: list[Any] = list(layer.mlp.levels)
        row: list[LevelState | None] = []
        fresh: list[FastWeights | None] = []
        for i, (state, weight, new) in enumerate(zip(old_states, old_weights, news, strict=True)):
            after = (
                None
                if state is None or new is None
                else step_level(levels, i, clocks, state, new, position, flush=flush)
            )
            changed = after is not None and state is not None and after.delta is not state.delta
            row.append(after)
            fresh.append(adapted_weights(levels[i], after) if changed and after is not None else weight)
        states.append(tuple(row))
        weights.append(tuple(fresh))
    return InnerState(tuple(states), position), tuple(weights)
