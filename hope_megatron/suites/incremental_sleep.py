"""Classes that arrive in groups, consolidated at night (`hope_megatron.consolidation`).

By day a group's examples are read once as a stream, and the model answers each with the state that has just read it. At night one
CMS level learns to give these answers without the state, surprising examples more often, while sentences of the base classes keep
the answers that the weights gave before the night. Of earlier groups nothing is kept but the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from hope_megatron.consolidation.replay import Experience
from hope_megatron.consolidation.waking import Teacher
from hope_megatron.model import LanguageModel
from hope_megatron.suites.episodes import ASK, LABEL, Groups, question, told
from hope_megatron.suites.fit import FitOptions, fit
from hope_megatron.suites.incremental_methods import Sentences, Stage, copies, fixed_labels
from hope_megatron.suites.nights import DRAWS, learning, night_batches
from hope_megatron.suites.task import IGNORE

_LEVEL = 0  # the next slower one than the memories
_KEPT = 0.5  # share of a group's examples that the replay buffer has room for
_NIGHTS = 2 * 10**6  # random numbers of the nights, apart from those of steps and groups
Pair = tuple[np.ndarray, np.ndarray]


def learn_with_sleep(
    model: LanguageModel, shown: Sentences, groups: Groups, known: Sequence[np.ndarray], options: FitOptions, seed: int
) -> list[Stage]:
    """The weights after each group's night; every state begins anew.

    Args:
        known: sentences of the base classes, which are held.
        options: of a night.
    """
    labels, stages = fixed_labels(groups), []
    for number, group in enumerate(groups):
        rng = np.random.default_rng((seed, _NIGHTS + number))
        shots = max(len(shown[name]) for name in group)
        stream, _ = told({name: shown[name] for name in group}, {name: labels[name] for name in group}, shots, rng)
        held = [known[i] for i in rng.integers(len(known), size=4 * options.batch_size)]
        teacher = Teacher(model, draws=DRAWS, seed=1000 * seed + number)
        read = list(teacher.wake(examples(stream)))
        general = list(teacher.answer(_pair(*question(words, 0)) for words in held))
        length = max(len(experience.inputs) for experience in read + general)
        batches = night_batches(
            _filled(read, length),
            _filled(general, length),
            capacity=max(2, round(_KEPT * len(read))),
            batch_size=options.batch_size,
            seed=seed,
        )
        with learning(model, _LEVEL):
            fit(model, batches, options)
        stages.append(Stage(list(labels)[: sum(map(len, groups[: number + 1]))], copies(model)))
    return stages


def examples(stream: list[int]) -> list[Pair]:
    """A stream of sentences, each with its mark and label, cut behind every label; asked is what follows the mark."""
    rows, start = [], 0
    for end, token in enumerate(stream, 1):
        if token >= LABEL:
            row = stream[start:end]
            rows.append(_pair(row, [row[i + 1] if word == ASK else IGNORE for i, word in enumerate(row)]))
            start = end
    return rows


def _pair(tokens: list[int], targets: list[int]) -> Pair:
    return np.array(tokens, np.int64), np.array(targets, np.int64)


def _filled(experiences: Iterable[Experience], length: int) -> list[Experience]:
    """Rows of one length; nothing is asked of the filling."""
    found = []
    for e in experiences:
        more = (0, length - len(e.inputs))
        inputs, targets = np.pad(e.inputs, more), np.pad(e.targets, more, constant_values=IGNORE)
        draws = np.pad(e.draws, (more, (0, 0)), constant_values=IGNORE)
        found.append(e._replace(inputs=inputs, targets=targets, draws=draws))
    return found
