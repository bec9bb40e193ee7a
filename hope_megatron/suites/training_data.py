"""What training code is given of a task: batches to learn from, and a validation set at the trained lengths. No test set."""

from __future__ import annotations

import numpy as np

from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.task import Batch, Task

_TRAINING, _VALIDATION = 0, 1  # kinds of random numbers


class TrainingData:
    """A task's training and validation splits of a seed. The test split cannot be reached through it.

    Args:
        task: what is to be learnt.
        seed: decides which sequences are held out, and which are drawn when.
    """

    def __init__(self, task: Task, seed: int):
        self.task_name, self.metric, self.trained = task.name, task.metric, task.trained
        self.lessons, self.known, self.longest_lesson = task.lessons, task.known, task.longest_lesson
        self._training, self._validation = task.source("training", seed), task.source("validation", seed)
        self._seed = seed

    def batch(self, step: int, size: int, name: str | None = None) -> Batch:
        """The batch of a training step: a function of seed and step.

        Args:
            name: a lesson; None: the task itself.
        """
        rng = np.random.default_rng((self._seed, _TRAINING, step))
        return self._training(self._checked(name or self.trained[-1]), size, rng)

    def validation(self, size: int, name: str | None = None) -> Batch:
        """The validation set: always the same sequences of a seed."""
        name = self._checked(name or self.trained[-1])
        rng = np.random.default_rng((self._seed, _VALIDATION, self.trained.index(name)))
        return self._validation(name, size, rng)

    def _checked(self, name: str) -> str:
        if name not in self.trained:
            raise SuiteError(f"{self.task_name}: {name!r} is not trained; training sees {', '.join(self.trained)}")
        return name
