"""Asking a model, after a stage of class-incremental learning, what class sentences are of."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hope_megatron.model import LanguageModel
from hope_megatron.suites.candidates import ClassSummaries
from hope_megatron.suites.episodes import LABEL, question, told
from hope_megatron.suites.incremental_methods import Sentences, Stage, repeat_state
from hope_megatron.suites.scoring import on_device
from hope_megatron.suites.task import IGNORE, pad_batch

_BATCH = 64


@torch.no_grad()
def stage_accuracy(
    model: LanguageModel, stage: Stage, asked: Mapping[str, list[np.ndarray]], shown: Sentences | None, seed: int
) -> float:
    """Share of sentences whose label is the likeliest among those of the stage's classes.

    Args:
        model: with the stage's weights.
        asked: sentences by class.
        shown: InCA: read before each question, of the candidate classes alone; the stage's state is not used.
    """
    model.eval()
    labels = {name: i for i, name in enumerate(stage.classes)}
    questions = [(name, words) for name, sentences in asked.items() for words in sentences]
    right = [
        answer == labels[name]
        for start in range(0, len(questions), _BATCH)
        for (name, _), answer in zip(
            questions[start:], _answers(model, stage, labels, questions[start : start + _BATCH], shown, seed)
        )
    ]
    return float(np.mean(right))


def _answers(
    model: LanguageModel,
    stage: Stage,
    labels: Mapping[str, int],
    questions: list[tuple[str, np.ndarray]],
    shown: Sentences | None,
    seed: int,
) -> list[int]:
    if shown is None:
        rows = [question(words, 0) for _, words in questions]
        allowed = [list(labels.values())] * len(rows)
        state = repeat_state(model, stage.state, len(rows)) if stage.state is not None else None
    else:
        rows, allowed, state = [], [], None
        summaries = ClassSummaries(model.embedding.weight)
        summaries.add({name: shown[name] for name in labels})
        rng = np.random.default_rng((seed, 6))
        for _, words in questions:
            names = summaries.candidates(words)
            of_classes = {name: shown[name] for name in names}
            context, _ = told(of_classes, {name: labels[name] for name in names}, len(shown[names[0]]), rng)
            tokens, targets = question(words, 0)
            rows.append(([*context, *tokens], [IGNORE] * len(context) + targets))
            allowed.append([labels[name] for name in names])
    batch = pad_batch(rows)
    tokens, targets = on_device(model, batch)
    logits = model(tokens, state=state).logits[targets != IGNORE]
    return [_likeliest(row, among) for row, among in zip(logits, allowed)]


def _likeliest(logits: Tensor, among: list[int]) -> int:
    return among[int(logits[LABEL + torch.tensor(among, device=logits.device)].argmax())]
