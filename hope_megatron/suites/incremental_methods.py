"""Ways to learn classes that arrive in groups. Each is given sentences to learn from, and nothing that it will be asked.

- "in context": the weights stand still; the examples of each group are read once, and the state is all that is kept;
- "in context, InCA": an external continual learner keeps a mean per class and one covariance of sentence embeddings; the nearest
  classes become candidates, and their examples alone are read before each question (arXiv 2412.15563);
- "fine-tuned": the weights are trained on each group's examples;
- "EWC": the same, held where earlier groups need them by their Fisher information (arXiv 1612.00796);
- "with sleep" (`incremental_sleep`): each group is read once; what the adapted model answers is replayed into one CMS level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hope_megatron.model import LanguageModel, ModelState
from hope_megatron.suites.episodes import Groups, question, told
from hope_megatron.suites.fit import FitOptions, fit
from hope_megatron.suites.scoring import batch_loss
from hope_megatron.suites.task import Batch, pad_batch

Sentences = Mapping[str, list[np.ndarray]]  # by class
_PIECE_TOKENS = 256
_GROUPS = 10**6  # random numbers of the groups, apart from those of steps


class Stage(NamedTuple):
    """What is known after a group."""

    classes: list[str]
    """All so far, in the order of their labels."""
    weights: list[Tensor]
    state: ModelState | None = None


def fixed_labels(groups: Groups) -> dict[str, int]:
    """A number for each class, in order of arrival."""
    return {name: i for i, name in enumerate(name for group in groups for name in group)}


def learn_in_context(model: LanguageModel, shown: Sentences, groups: Groups, seed: int) -> list[Stage]:
    """The state after each group; it goes on from group to group, the weights stay."""
    model.eval()
    labels, weights, state, stages = fixed_labels(groups), copies(model), None, []
    for number, group in enumerate(groups):
        rng = np.random.default_rng((seed, _GROUPS + number))
        shots = max(len(shown[name]) for name in group)
        tokens, _ = told({name: shown[name] for name in group}, {name: labels[name] for name in group}, shots, rng)
        state = read_stream(model, tokens, state)
        stages.append(Stage(list(labels)[: sum(map(len, groups[: number + 1]))], weights, state))
    return stages


def learn_in_weights(
    model: LanguageModel, shown: Sentences, groups: Groups, options: FitOptions, strength: float, seed: int
) -> list[Stage]:
    """The weights after training on single sentences of each group in turn; strength 0 is plain fine-tuning, else EWC's."""
    labels, stages = fixed_labels(groups), []
    anchors: list[tuple[Tensor, Tensor, Tensor]] = []
    for number, group in enumerate(groups):
        rng = np.random.default_rng((seed, _GROUPS + number))
        draw = partial(_single_sentences, shown, labels, group)
        penalty = partial(ewc_penalty, anchors, strength) if anchors and strength else None
        fit(model, lambda step: draw(options.batch_size, rng), options, penalty=penalty)  # noqa: B023 (used at once)
        if strength:
            anchors += fisher(model, lambda: draw(1, rng))  # noqa: B023
        stages.append(Stage(list(labels)[: sum(map(len, groups[: number + 1]))], copies(model)))
    return stages


def _single_sentences(
    shown: Sentences, labels: Mapping[str, int], group: list[str], size: int, rng: np.random.Generator
) -> Batch:
    """Sentences of a group, each alone, of those that in-context learning gets to read."""
    rows = []
    for name in rng.choice(group, size):
        sentences = shown[name]
        rows.append(question(sentences[int(rng.integers(len(sentences)))], labels[name]))
    return pad_batch(rows)


def copies(model: LanguageModel) -> list[Tensor]:
    """The weights as they are now."""
    return [p.detach().clone() for p in model.parameters()]


@torch.no_grad()
def read_stream(model: LanguageModel, tokens: list[int], state: ModelState | None) -> ModelState:
    """The state of one stream after some more tokens."""
    stream = torch.tensor([tokens], device=next(model.parameters()).device)
    for piece in stream.split(_PIECE_TOKENS, 1):
        state = model(piece, state=state, return_state=True).state
    assert state is not None
    return state


def repeat_state(model: LanguageModel, state: ModelState, times: int) -> ModelState:
    """The state of one stream as that of `times` equal ones; which axis counts streams, two new states tell."""
    one, two = model.init_state(1).tensors(), model.init_state(2).tensors()
    repeated = {}
    for name, tensor in state.tensors().items():
        axes = [i for i, (a, b) in enumerate(zip(one[name].shape, two[name].shape)) if a != b]
        repeated[name] = tensor.repeat_interleave(times, axes[0]) if axes else tensor
    return ModelState.from_tensors(repeated, like=state)


def fisher(model: LanguageModel, draw: Callable[[], Batch], samples: int = 32) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(parameter, where it is, mean squared gradient of single sentences), for every parameter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    squares = [torch.zeros_like(p) for p in parameters]
    for _ in range(samples):
        gradients = torch.autograd.grad(batch_loss(model, draw()), parameters, allow_unused=True)
        for square, gradient in zip(squares, gradients):
            if gradient is not None:
                square += gradient.detach() ** 2 / samples
    return [(p, p.detach().clone(), square) for p, square in zip(parameters, squares)]


def ewc_penalty(anchors: list[tuple[Tensor, Tensor, Tensor]], strength: float) -> Tensor:
    """strength / 2 times the sum over groups of F (theta - theta*)^2."""
    return 0.5 * strength * torch.stack([(needed * (p - at) ** 2).sum() for p, at, needed in anchors]).sum()
