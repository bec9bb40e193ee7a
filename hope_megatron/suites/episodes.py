"""Classes in context: sentences, each with a mark that asks for its label and the label; and the training on such episodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.labelled import NUM_WORDS, PER_CLASS, Labelled
from hope_megatron.suites.task import IGNORE, Batch, Draw, Split, Task, pad_batch

ASK = 1
WORD = 2  # first word id
LABEL = WORD + NUM_WORDS  # first label id
CLASSES_PER_GROUP = 6  # at most; all other classes are for learning to learn
Groups = list[list[str]]


def split_classes(labelled: Labelled, num_groups: int, seed: int = 0) -> tuple[list[str], Groups]:
    """The classes to learn to learn from, and groups of others: at most half, at most `CLASSES_PER_GROUP` a group.

    Args:
        seed: which classes are which.

    Raises:
        SuiteError: if there are too few.
    """
    names = np.random.default_rng((seed, 4)).permutation(labelled.classes).tolist()
    new = min(len(names) - len(names) // 2, num_groups * CLASSES_PER_GROUP)
    base, rest = names[:-new], names[-new:]
    if len(rest) < num_groups:
        raise SuiteError(
            f"{labelled.name}: {len(names)} classes are too few for {num_groups} groups; at least {2 * num_groups}"
        )
    bounds = np.linspace(0, len(rest), num_groups + 1).astype(int)
    return base, [rest[a:b] for a, b in pairwise(bounds)]


def episode_task(labelled: Labelled, num_groups: int, shots: int) -> Task:
    """Learning to learn: as many base classes at a time as come in a group. Bins are "classes x sentences".

    Validation episodes are told and asked of sentences that no training episode has.

    Without lessons of one sentence per class HOPE only guessed among the labels after 900 steps: that a sentence is followed by
    what followed it before comes first, that similar ones are too comes after.
    """
    _, groups = split_classes(labelled, num_groups)
    num_labels, in_group = sum(map(len, groups)), max(map(len, groups))

    def source(split: Split, seed: int) -> Draw:
        train, validation = labelled.without_validation(seed)
        sentences = train.train if split == "training" else validation.test
        base, _ = split_classes(labelled, num_groups, seed)

        def draw(bin_name: str, size: int, rng: np.random.Generator) -> Batch:
            classes, most = map(int, bin_name.split(" x "))
            return episodes(
                sentences, base, size, rng, num_classes=classes, num_sentences=most, num_labels=num_labels, shots=shots
            )

        if split == "test":
            raise SuiteError("episodes are for learning to learn; the test is of other classes")
        return draw

    lessons = (f"{min(2, in_group)} x 1", f"{in_group} x 1", f"{in_group} x 3")
    return Task(
        "episodes",
        LABEL + num_labels,
        (f"{in_group} x {PER_CLASS}",),
        source,
        lessons=lessons,
        known=0.85,
        longest_lesson=1 / 4,
    )


def episodes(
    sentences: Mapping[str, list[np.ndarray]],
    base: list[str],
    size: int,
    rng: np.random.Generator,
    *,
    num_classes: int,
    num_sentences: int,
    num_labels: int,
    shots: int,
) -> Batch:
    """Sequences in which some classes have random labels: sentence, mark, label; asked of all that can be known.

    Args:
        sentences: by class.
        base: the classes to pick from.
        size: sequences.
        num_sentences: different sentences of a class at most; they take turns.
        num_labels: labels to draw from.
        shots: sentences told of each class.
    """
    rows = []
    for _ in range(size):
        picked = rng.choice(base, min(num_classes, len(base)), replace=False)
        labels = rng.choice(num_labels, len(picked), replace=False)
        some = {name: rng.permutation(len(sentences[name]))[:num_sentences] for name in picked}
        told_of = {name: [sentences[name][i] for i in chosen] for name, chosen in some.items()}
        rows.append(told(told_of, dict(zip(picked, labels)), shots, rng))
    return pad_batch(rows)


def told(
    sentences: dict[str, list[np.ndarray]], labels: dict[str, int], shots: int, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """`shots` times every class in random order: its next sentence, mark and label; the label is asked but for the first."""
    tokens: list[int] = []
    targets: list[int] = []
    times: Counter[str] = Counter()
    for name in rng.permutation(np.repeat(list(labels), shots)):
        of_class, label = sentences[name], LABEL + labels[name]
        words = (WORD + of_class[times[name] % len(of_class)]).tolist()
        tokens += [*words, ASK, label]
        targets += [IGNORE] * len(words) + [label if times[name] else IGNORE, IGNORE]
        times[name] += 1
    return tokens, targets


def question(words: np.ndarray, label: int) -> tuple[list[int], list[int]]:
    """A sentence with its mark, which is asked for the label."""
    return [*(WORD + words).tolist(), ASK], [IGNORE] * len(words) + [LABEL + label]
