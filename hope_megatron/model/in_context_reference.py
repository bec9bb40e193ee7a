"""Learning in context, said plainly: one context, one segment, one weight at a time, by swapping whole parameters.

Slow, single-process, for any dtype: what `in_context.py` is compared with. The model's ordinary forward is called with other
matrices in the place of the learnt ones, so nothing here knows about fast copies, batches of them, or ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from hope_megatron.config.model import CMSConfig, CMSLevelConfig
from hope_megatron.model.language_model import LanguageModel

Matrices = dict[str, Tensor]
"""By name of the parameter."""


def learn_reference(
    model: LanguageModel,
    tokens: Tensor,
    targets: Tensor,
    *,
    truncate_tokens: int | None = None,
    recorded: list[list[Matrices]] | None = None,
    flush: bool = False,
) -> tuple[Tensor, list[list[Matrices]], list[Matrices]]:
    """Losses [B, T] of contexts that are learnt from as they are read.

    Args:
        tokens, targets: [B, T] int64.
        truncate_tokens: the outer graph is cut every so many tokens.
        recorded: inner gradients by context and segment, to be taken instead of new ones. With them the losses are an ordinary
            function of parameters and rates, whose derivative is the first-order gradient.
        flush: learn from the last, partial chunk of every level too.

    Returns:
        Losses; inner gradients, as `recorded` wants them; and by context what the last segment left: weights minus learnt ones.
    """
    losses, gradients, ends = [], [], []
    for row in range(tokens.size(0)):
        one = _Context(model, truncate_tokens, recorded[row] if recorded else None)
        losses.append(one.read(tokens[row : row + 1], targets[row : row + 1], flush))
        gradients.append(one.gradients)
        ends.append({name: delta.detach() for name, delta in one.delta.items()})
    return torch.cat(losses), gradients, ends


class _Context:
    """One context from its beginning to its end."""

    def __init__(self, model: LanguageModel, truncate_tokens: int | None, recorded: list[Matrices] | None) -> None:
        self.model, self.cms, self.recorded = model, model.model_config.cms, recorded
        self.truncate_tokens = truncate_tokens
        self.gradients: list[Matrices] = []
        parameters = dict(model.named_parameters())
        self.learnt: Matrices = {}
        self.level_of: dict[str, int] = {}
        for layer in range(model.model_config.num_layers):
            for i, level in enumerate(self.cms.levels):
                for part in ("up", "down") if level.ticks else ():
                    name = f"layers.{layer}.mlp.levels.{i}.{part}.weight"
                    self.learnt[name], self.level_of[name] = parameters[name], i
        zeros = {name: torch.zeros_like(weight) for name, weight in self.learnt.items()}
        self.delta, self.start = dict(zeros), dict(zeros)  # minus the learnt weights
        self.gathered, self.of_slower, self.momentum = dict(zeros), dict(zeros), dict(zeros)

    def read(self, tokens: Tensor, targets: Tensor, flush: bool = False) -> Tensor:
        """Losses [1, T]."""
        segment, state, losses = self.cms.inner_segment_tokens, None, []
        for first in range(0, tokens.size(1), segment):
            if self.truncate_tokens and first % self.truncate_tokens == 0 and state is not None:
                state = state.detach()
                for kept in (self.delta, self.start):
                    kept.update({name: delta.detach() for name, delta in kept.items()})
            weights = {name: weight + self.delta[name] for name, weight in self.learnt.items()}
            # an own node: slow weights stand for several segments, the inner gradient is that of one
            weights = {name: weight.clone() for name, weight in weights.items()}
            piece = slice(first, first + segment)
            with torch.enable_grad():
                call: dict[str, Any] = {"state": state, "return_state": True}
                output = functional_call(self.model, weights, (tokens[:, piece], targets[:, piece].clone()), call)
            losses.append(output.losses)
            full = first + segment <= tokens.size(1)
            if full or flush:
                gradient = self._inner_gradient(tokens, targets, piece, state, weights)
                self._learn(gradient, min(first + segment, tokens.size(1)), partial=not full)
            state = output.state
        if flush and tokens.size(1) % segment == 0:
            self._learn({name: torch.zeros_like(w) for name, w in self.learnt.items()}, tokens.size(1), partial=True)
        return torch.cat(losses, 1)

    def _inner_gradient(self, tokens: Tensor, targets: Tensor, piece: slice, state: Any, weights: Matrices) -> Matrices:
        """Of the segment's summed loss, read again from a state that is constant."""
        if self.recorded is not None:
            gradient = self.recorded[len(self.gradients)]
        else:
            leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
            call = {"state": state.detach() if state is not None else None}
            with torch.enable_grad():
                losses = functional_call(self.model, leaves, (tokens[:, piece], targets[:, piece].clone()), call).losses
                found = torch.autograd.grad(losses.sum(), list(leaves.values()))
            gradient = dict(zip(leaves, found, strict=True))
        self.gradients.append(gradient)
        return gradient

    def _learn(self, gradient: Matrices, position: int, partial: bool = False) -> None:
        """Every clock that stands at `position` ticks; at the end of a stream every other one, which holds a part of a chunk."""
        due = lambda level: (position % _chunk(level) == 0) != partial  # noqa: E731
        for name, new in gradient.items():
            level = self.cms.levels[self.level_of[name]]
            self.gathered[name] = self.gathered[name] + new
            self.of_slower[name] = self.of_slower[name] + new
            if due(level):
                self.momentum[name] = level.inner_momentum * self.momentum[name] + self.gathered[name]
                anchor = self.start[name] if self.cms.inner_decay_towards == "start" else -self.learnt[name].detach()
                pull = level.inner_weight_decay * (self.delta[name] - anchor)
                self.delta[name] = self.delta[name] - self._rate(name, self.level_of[name]) * (
                    self.momentum[name] + pull
                )
                self.gathered[name] = torch.zeros_like(new)
            slower = _slower(self.cms, self.level_of[name])
            if slower is not None and due(self.cms.levels[slower]):
                anchor = 0 if self.cms.inner_decay_towards == "start" else -self.learnt[name].detach()
                pull = self.cms.levels[slower].inner_weight_decay * (self.start[name] - anchor)
                step = self._rate(name, slower) * (self.of_slower[name] + pull)
                self.delta[name] = self.start[name] = self.start[name] - step
                self.momentum[name] = self.of_slower[name] = torch.zeros_like(new)

    def _rate(self, name: str, level: int) -> Tensor | float:
        """The rate of a level in the same layer, in the shape of the parameter `name`."""
        config = self.cms.levels[level]
        if config.inner_rate_kind == "constant":
            return config.inner_rate
        factor = dict(self.model.named_parameters())[f"layers.{name.split('.')[1]}.mlp.levels.{level}.log_rate"].exp()
        if config.inner_rate_kind == "learned":
            return config.inner_rate * factor
        if ".down." in name:
            return config.inner_rate * factor.expand_as(self.learnt[name])
        blocks = self.learnt[name].size(0) // factor.numel()
        return config.inner_rate * torch.cat([factor] * blocks)[:, None].expand_as(self.learnt[name])


def _chunk(level: CMSLevelConfig) -> int:
    assert level.inner_chunk_tokens is not None
    return level.inner_chunk_tokens


def _slower(cms: CMSConfig, level: int) -> int | None:
    """The level that learns where this one starts."""
    after = [i for i, other in enumerate(cms.levels) if i > level and other.ticks]
    return after[0] if cms.connection == "nested" and after else None
