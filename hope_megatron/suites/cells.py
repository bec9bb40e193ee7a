"""What a cell does: train on training data, choose on validation data, and only then read the test."""

from __future__ import annotations

from collections.abc import Mapping

from hope_megatron.config.model import ModelConfig
from hope_megatron.suites.fit import FitOptions, fit_task
from hope_megatron.suites.held_out import TEST_SEQUENCES, score_test, trajectory
from hope_megatron.suites.suite import Cell, Outcome
from hope_megatron.suites.task import Task
from hope_megatron.suites.training_data import TrainingData


def train_and_test(
    config: ModelConfig,
    task: Task,
    options: FitOptions,
    cell: Cell,
    sequences: Mapping[str, int] | int = TEST_SEQUENCES,
) -> Outcome:
    """A training with its validation; and, but for a try, the test and how the next longer bin went over the steps.

    Args:
        sequences: of the test, in all bins or by bin.
    """
    trained = fit_task(config, TrainingData(task, cell.seed), options, cell.seed)
    if cell.is_try:
        return Outcome(trained.validation)
    scores = {kind: score_test(trained, task, cell.seed, kind, sequences) for kind in trained.validation}
    paths = {kind: trajectory(trained, task, cell.seed, kind, task.bins[1:2]) for kind in scores}
    return Outcome(trained.validation, scores, paths if len(task.bins) > 1 else {})
