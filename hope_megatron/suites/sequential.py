"""Training on one task after the other, with a night after each or without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from hope_megatron.config.model import ModelConfig
from hope_megatron.consolidation.replay import Experience
from hope_megatron.consolidation.waking import Teacher
from hope_megatron.model import LanguageModel
from hope_megatron.suites.fit import FitOptions, Snapshot, Trained, WeightAverage, fit, small_model, snapshot, validated
from hope_megatron.suites.incremental_methods import copies
from hope_megatron.suites.nights import DRAWS, learning, night_batches
from hope_megatron.suites.task import Batch
from hope_megatron.suites.training_data import TrainingData

NIGHT_SHARE = 0.2  # of a domain's steps
NIGHT_ROWS = 32  # that are read before a night, and that are kept of all earlier domains together
_LEVEL = 1  # the next slower CMS level than the one that learns at every step
_KEPT = 10**6  # numbers of batches that are kept, apart from those of steps


def learn_in_sequence(
    config: ModelConfig, data: Sequence[TrainingData], options: FitOptions, seed: int, *, sleeps: bool = False
) -> Trained:
    """One domain after the other; a snapshot of the weights after each.

    Args:
        sleeps: the last steps of every domain but the first are a night (`sleep_on`).
    """
    model = small_model(config, seed)
    average = WeightAverage(model, options.ema)
    snapshots: list[Snapshot] = []
    for number, domain in enumerate(data, 1):
        night = round(NIGHT_SHARE * options.steps) if sleeps and number > 1 else 0
        before = copies(model)
        fit(
            model,
            lambda step, domain=domain: domain.batch(step, options.batch_size),  # type: ignore[misc]
            replace(options, steps=options.steps - night),
            after=lambda steps: average.update(),
        )
        if night:
            rest = replace(options, steps=night)
            sleep_on(model, before, data[: number - 1], domain, rest, seed, lambda steps: average.update())
        snapshots.append(snapshot(model, average, number * options.steps))
    return validated(model, snapshots, data)


def sleep_on(
    model: LanguageModel,
    before: list[torch.Tensor],
    earlier: Sequence[TrainingData],
    domain: TrainingData,
    options: FitOptions,
    seed: int,
    after: Callable[[int], None] = lambda steps: None,
) -> None:
    """A night: one CMS level learns what the model says of the new domain with its adapted state, and what it said of rows of the
    earlier domains before the new one.

    Args:
        before: the weights before the new domain.
        earlier: the domains before it.
    """
    now = copies(model)
    _put(model, before)
    kept = [pair for part in earlier for pair in _pairs(part.batch(_KEPT, NIGHT_ROWS // len(earlier)))]
    general: list[Experience] = list(Teacher(model, draws=DRAWS, seed=seed).answer(kept))
    _put(model, now)
    read = list(Teacher(model, draws=DRAWS, seed=seed + 1).wake(_pairs(domain.batch(_KEPT, NIGHT_ROWS))))
    batches = night_batches(read, general, capacity=NIGHT_ROWS // 2, batch_size=options.batch_size, seed=seed)
    with learning(model, _LEVEL):
        fit(model, batches, options, after=after)


def _pairs(batch: Batch) -> list[tuple]:
    return list(zip(batch.tokens, batch.targets))


@torch.no_grad()
def _put(model: LanguageModel, weights: list[torch.Tensor]) -> None:
    for parameter, value in zip(model.parameters(), weights):
        parameter.copy_(value)
