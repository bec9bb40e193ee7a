"""The test: read once per training, after its last step.

No module that trains or chooses may import this one: an import contract in pyproject.toml says so. What is read here is
written into the record and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.fit import Trained, Weights
from hope_megatron.suites.scoring import score_batch
from hope_megatron.suites.task import Batch, Task

TEST_SEQUENCES = 256
TRAJECTORY_SEQUENCES = 64
_TEST, _TRAJECTORY = 2, 3  # kinds of random numbers; training and validation have 0 and 1
Scores = dict[str, float]


def score_test(
    trained: Trained,
    task: Task,
    seed: int,
    weights: Weights,
    sequences: Mapping[str, int] | int = TEST_SEQUENCES,
    *,
    snapshot: int = -1,
) -> Scores:
    """The score of every bin, on test sequences drawn for this seed.

    Args:
        trained: a training that is over.
        seed: of the training: its training and validation sequences are not in the test.
        weights: raw or averaged ones.
        sequences: how many, in all bins or by bin.
        snapshot: whose weights; the last by default.

    Raises:
        SuiteError: if these weights were tested already.
    """
    read = (task.name, weights, snapshot)
    if read in trained.tested:
        raise SuiteError(f"the test of {task.name} was already read with these {weights} weights; it is read once")
    trained.tested.add(read)
    model = trained.use(weights, snapshot)
    sizes = sequences if isinstance(sequences, Mapping) else dict.fromkeys(task.bins, sequences)
    return {
        name: score_batch(model, _draw(task, seed, _TEST, name, sizes[name]), task.metric).value for name in task.bins
    }


def trajectory(trained: Trained, task: Task, seed: int, weights: Weights, bins: tuple[str, ...]) -> dict[str, list]:
    """How the score of some bins went over the steps, read from the snapshots after training, on sequences of its own.

    Returns:
        "steps", and by bin a score for each.
    """
    batches = {name: _draw(task, seed, _TRAJECTORY, name, TRAJECTORY_SEQUENCES) for name in bins}
    found: dict[str, list] = {"steps": [snapshot.step for snapshot in trained.snapshots], **{name: [] for name in bins}}
    for i in range(len(trained.snapshots)):
        model = trained.use(weights, i)
        for name, batch in batches.items():
            found[name].append(score_batch(model, batch, task.metric).value)
    return found


def _draw(task: Task, seed: int, kind: int, name: str, size: int) -> Batch:
    rng = np.random.default_rng((seed, kind, task.bins.index(name)))
    return task.source("test", seed)(name, size, rng)
