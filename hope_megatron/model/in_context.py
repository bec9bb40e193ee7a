"""Learning in context (eq. 71): a context is read chunk after chunk, and the fast copies of the CMS weights learn from each.

A segment is the span between two ticks of the fastest inner clock. It is read at the fast weights as they stand; the gradient
of its next-token losses by these weights, with the memories' states at its start taken as constants, goes to the clocks.
Every context of the batch has fast weights of its own. Where gradients are wanted, the outer one is taken at the fast
weights (first order) and flows through the memories' states from segment to segment; inner gradients are constants to it.
`in_context_reference.py` says the same plainly.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hope_megatron.config.model import ModelConfig
from hope_megatron.layers.continuum_mlp import FastLevels, FastWeights
from hope_megatron.layers.inner_update import (
    LevelState,
    adapted_weights,
    initial_level_state,
    inner_clocks,
    step_level,
)
from hope_megatron.model.state import InnerState, ModelState

FastModel = tuple[FastLevels, ...]
"""Fast weights by layer and level."""


class LearningModel(Protocol):
    """What learning in context needs of a model; `LanguageModel` is one."""

    model_config: ModelConfig
    layers: nn.ModuleList

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
) -> tuple[Tensor, ModelState | None]:
    """Read a piece of each stream, learning from it.

    Args:
        tokens: [B, T] int64. Only the last piece of a stream may end inside a segment; nothing is learnt from that rest.
        targets: [B, T] int64, the next tokens, or IGNORE: read, but not learnt from.
        state: where the streams stand; None begins new ones.
        return_state: also return where they stand now, cut from the graph.

    Returns:
        Losses [B, T], each at the weights before its segment was learnt from; and the state if wanted.

    Raises:
        InContextError: the model has no inner clock, or the stream stands inside a segment.
    """
    outer = torch.is_grad_enabled()
    segment = model.model_config.cms.inner_segment_tokens if model.model_config.cms.learns_in_context else 1
    inner = state.inner if state is not None else None
    inner = initial_inner_state(model, tokens.size(0)) if inner is None else inner
    if inner.position % segment:
        raise InContextError(
            f"the stream stands at token {inner.position}, inside a segment of {segment}; read pieces of a multiple of {segment} "
            "tokens while learning"
        )
    mixers: tuple[Any, ...] | None = state.layers if state is not None else None
    fast, losses = _adapted(model, inner), []
    num_tokens = tokens.size(1)
    for first in range(0, num_tokens, segment):
        last = first + segment >= num_tokens
        learns = first + segment <= num_tokens and (return_state or not last)
        piece = slice(first, first + segment)
        # a fresh view, so that the inner gradient knows this segment only, though slow levels keep their weights for several
        here = _views(fast, needs_grad=learns)
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
        if gradients is None:
            inner = inner._replace(position=inner.position + tokens[:, piece].size(1))
        else:
            inner, fast = _step(model, inner, fast, gradients, inner.position + segment)
    end = ModelState(mixers or (), inner).detach() if return_state else None
    return torch.cat(losses, 1), end


def _views(fast: FastModel, needs_grad: bool) -> FastModel:
    """The same weights as new nodes of the graph."""

    def view(weight: Tensor) -> Tensor:
        weight = weight.view_as(weight) if weight.requires_grad and torch.is_grad_enabled() else weight.detach()
        return weight if weight.requires_grad or not needs_grad else weight.requires_grad_()

    return tuple(tuple(None if w is None else FastWeights(view(w.up), view(w.down)) for w in levels) for levels in fast)


def _gradients(losses: Tensor, fast: FastModel, *, keep_graph: bool) -> FastModel:
    """Gradient of each context's summed losses by its own fast weights."""
    flat = [w for levels in fast for weights in levels if weights is not None for w in weights]
    found = iter(torch.autograd.grad(losses.sum(), flat, retain_graph=keep_graph))
    return tuple(
        tuple(None if weights is None else FastWeights(next(found), next(found)) for weights in levels)
        for levels in fast
    )


def _step(
    model: LearningModel, inner: InnerState, fast: FastModel, gradients: FastModel, position: int
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
            after = None if state is None or new is None else step_level(levels, i, clocks, state, new, position)
            changed = after is not None and state is not None and after.delta is not state.delta
            row.append(after)
            fresh.append(adapted_weights(levels[i], after) if changed and after is not None else weight)
        states.append(tuple(row))
        weights.append(tuple(fresh))
    return InnerState(tuple(states), position), tuple(weights)
