"""Training on one task after the other."""

from __future__ import annotations

from collections.abc import Sequence

from hope_megatron.config.model import ModelConfig
from hope_megatron.suites.fit import FitOptions, Snapshot, Trained, WeightAverage, fit, small_model, snapshot, validated
from hope_megatron.suites.training_data import TrainingData


def learn_in_sequence(config: ModelConfig, data: Sequence[TrainingData], options: FitOptions, seed: int) -> Trained:
    """One domain after the other; a snapshot of the weights after each."""
    model = small_model(config, seed)
    average = WeightAverage(model, options.ema)
    snapshots: list[Snapshot] = []
    for number, domain in enumerate(data, 1):
        fit(
            model,
            lambda step, domain=domain: domain.batch(step, options.batch_size),  # type: ignore[misc]
            options,
            after=lambda steps: average.update(),
        )
        snapshots.append(snapshot(model, average, number * options.steps))
    return validated(model, snapshots, data)
