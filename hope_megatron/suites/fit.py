"""Training a small model in this process, watched on validation data alone.

Nothing here can reach a test set: `TrainingData` has none, and an import contract keeps `suites.held_out` out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from types import SimpleNamespace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hope_megatron.config.model import ModelConfig
from hope_megatron.config.optim import OptimConfig
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.model import LanguageModel, build_model
from hope_megatron.optim import build_optimizer
from hope_megatron.optim.average import update_average
from hope_megatron.optim.schedule import apply_lr, lr_at
from hope_megatron.parallel.distributed import init_distributed
from hope_megatron.suites.scoring import Score, batch_loss, score_batch
from hope_megatron.suites.task import Batch
from hope_megatron.suites.training_data import TrainingData

NUM_LOOKS = 20  # snapshots of the weights during a training
VALIDATION_SEQUENCES = 128
_GRAD_CLIP = 1.0
Weights = Literal["raw", "averaged"]


@dataclass(frozen=True)
class FitOptions:
    """How a model is trained: the same for every family of a table."""

    steps: int
    batch_size: int = 32
    lr: float = 3e-3
    optimizer: str = "adamw"
    ema: float = 0.98
    """Decay per step of the exponential average of weights that is kept beside the raw ones."""


class Snapshot(NamedTuple):
    """The weights after some steps."""

    step: int
    weights: dict[Weights, list[Tensor]]


@dataclass
class Trained:
    """A model after its last step. Its test is taken once (`suites.held_out`)."""

    model: LanguageModel
    snapshots: list[Snapshot]
    validation: dict[Weights, Score]
    """Of the last step's weights, at the trained lengths."""
    tested: set[tuple[str, Weights, int]] = field(default_factory=set)
    """Tests that were read: task, weights, snapshot."""

    def use(self, weights: Weights, snapshot: int = -1) -> LanguageModel:
        """The model with the weights of a snapshot."""
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), self.snapshots[snapshot].weights[weights]):
                parameter.copy_(value)
        return self.model


def fit(
    model: LanguageModel,
    batches: Callable[[int], Batch],
    options: FitOptions,
    *,
    after: Callable[[int], None] = lambda steps: None,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """Train on the mean loss of the answers, for all of the steps.

    Warm-up over a tenth of the steps (at most 100), then cosine to a tenth; gradients clipped to norm 1.

    Args:
        batches: from the step to its batch.
        after: called after every step with the steps made.
        penalty: added to the loss of every step.
    """
    optim = OptimConfig.model_validate(dict(name=options.optimizer, lr=options.lr, weight_decay=0.01))
    optimizer = build_optimizer(model.named_parameters(), optim)
    warmup = min(100, options.steps // 10)
    schedule = SimpleNamespace(schedule="cosine", warmup_steps=warmup, total_steps=options.steps, min_lr_ratio=0.1)
    for step in range(options.steps):
        model.train()
        apply_lr(optimizer, lr_at(step, schedule))
        loss = batch_loss(model, batches(step))
        if penalty is not None:
            loss = loss + penalty()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        after(step + 1)


def small_model(config: ModelConfig, seed: int) -> LanguageModel:
    """Fresh weights on this process's device. Joins a world of one process if there is none."""
    mesh = init_distributed(ParallelConfig(), num_threads=torch.get_num_threads())
    return build_model(config, seed=seed).to(mesh.device)


def fit_task(config: ModelConfig, data: TrainingData, options: FitOptions, seed: int) -> Trained:
    """Train a fresh model for all of the steps: no score ends a training early.

    Lessons end by their validation score. Raw and averaged weights are kept at `NUM_LOOKS` steps.
    """
    model = small_model(config, seed)
    lessons, average = _Lessons(data, options.steps), WeightAverage(model, options.ema)
    snapshots: list[Snapshot] = []
    every = max(1, options.steps // NUM_LOOKS)

    def after(steps: int) -> None:
        average.update()
        if steps % every == 0 or steps == options.steps:
            snapshots.append(snapshot(model, average, steps))
        if lessons.left and steps % max(1, options.steps // 60) == 0:
            lessons.look(steps, score_batch(model, data.validation(VALIDATION_SEQUENCES, lessons.left[0]), data.metric))

    def batch(step: int) -> Batch:
        return data.batch(step, options.batch_size, lessons.left[0] if lessons.left else None)

    fit(model, batch, options, after=after)
    return validated(model, snapshots, [data])


def validated(model: LanguageModel, snapshots: list[Snapshot], data: Sequence[TrainingData]) -> Trained:
    """A training that is over, its last weights scored on validation data: the mean over the tasks."""
    trained = Trained(model, snapshots, {})
    for kind in snapshots[-1].weights:
        scores = [score_batch(trained.use(kind), d.validation(VALIDATION_SEQUENCES), d.metric) for d in data]
        trained.validation[kind] = Score(*(fmean(part) for part in zip(*scores)))
    return trained


def snapshot(model: LanguageModel, average: WeightAverage, step: int) -> Snapshot:
    """Copies of the weights as they are, and of their average."""
    return Snapshot(step, {"raw": [p.detach().clone() for p in model.parameters()], "averaged": average.values()})


class WeightAverage:
    """Exponential average of a model's weights over the steps made so far, as `training.ema` keeps it."""

    def __init__(self, model: LanguageModel, decay: float):
        self._parameters, self._decay, self._step = [*model.parameters()], decay, 0
        self._averages = [torch.zeros_like(p) for p in self._parameters]

    def update(self) -> None:
        """Take up the weights as they are now."""
        self._step += 1
        for average, parameter in zip(self._averages, self._parameters):
            update_average(average, parameter, self._decay, self._step)

    def values(self) -> list[Tensor]:
        """The average, as new tensors."""
        return [average.clone() for average in self._averages]


class _Lessons:
    """The lessons of a task that are still to be learnt. Each ends when it is known, at the latest after a share of the steps."""

    def __init__(self, data: TrainingData, steps: int):
        self.left, self._began = list(data.lessons), 0
        self._known, self._longest = data.known, int(steps * data.longest_lesson)

    def look(self, steps: int, reached: Score) -> None:
        """After some steps of training the first lesson left is answered with a validation score."""
        if reached.value >= self._known or steps - self._began >= self._longest:
            self.left.pop(0)
            self._began = steps
