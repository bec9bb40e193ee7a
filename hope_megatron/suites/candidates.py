"""InCA's external continual learner: which classes is a sentence likely to be of? (arXiv 2412.15563)

There the embedding is that of tags a language model names; here it is the mean embedding of the sentence's words in the model
itself. A class is a mean, all classes share one covariance, and both are kept up class by class: nothing is trained and
nothing is forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from hope_megatron.suites.episodes import WORD

NUM_CANDIDATES = 3
_RIDGE = 0.1  # share of the mean variance added to every direction


class ClassSummaries:
    """Means of classes and their shared covariance in the space of an embedding [vocabulary, D]."""

    def __init__(self, embedding: torch.Tensor):
        self._embedding = embedding.detach().double().cpu().numpy()
        self._means: dict[str, np.ndarray] = {}
        self._scatter = np.zeros((self._embedding.shape[1],) * 2)
        self._count = 0

    def add(self, sentences: Mapping[str, list[np.ndarray]]) -> None:
        """Take up new classes by their sentences, arrays of word ids."""
        for name, examples in sentences.items():
            points = np.stack([self.embed(words) for words in examples])
            self._means[name] = points.mean(0)
            self._scatter += (points - points.mean(0)).T @ (points - points.mean(0))
            self._count += len(points)

    def embed(self, words: np.ndarray) -> np.ndarray:
        """[D]: the mean of a sentence's word embeddings."""
        return self._embedding[WORD + words].mean(0)

    def candidates(self, words: np.ndarray, count: int = NUM_CANDIDATES) -> list[str]:
        """The classes nearest by Mahalanobis distance, nearest first."""
        covariance = self._scatter / self._count
        covariance += _RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance)) + 1e-12 * np.eye(
            len(covariance)
        )
        names = list(self._means)
        away = np.stack([self._means[name] for name in names]) - self.embed(words)
        distances = np.einsum("cd,cd->c", away, np.linalg.solve(covariance, away.T).T)
        return [names[i] for i in np.argsort(distances, kind="stable")[:count]]
