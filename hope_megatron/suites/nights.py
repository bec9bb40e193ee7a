"""Ways to keep what a day has brought. Each is given the day's documents and general text, and nothing that it will be asked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from hope_megatron.consolidation.dreaming import dream
from hope_megatron.consolidation.night import NightSource, Rows
from hope_megatron.consolidation.replay import Experience, ReplayBuffer, rows_of
from hope_megatron.consolidation.waking import Teacher
from hope_megatron.model import IGNORE, LanguageModel
from hope_megatron.suites.fit import FitOptions, Snapshot, WeightAverage, fit, snapshot
from hope_megatron.suites.incremental_methods import ewc_penalty, fisher
from hope_megatron.suites.task import Batch

DRAWS = 16
GENERAL_SHARE = 0.5
_LEVEL = re.compile(r"layers\.\d+\.mlp\.levels\.(\d+)\.")


class Manner(NamedTuple):
    """How a method learns at night."""

    distills: bool = False
    """From the answers of the adapted model; else from the tokens themselves."""
    general: bool = True
    """With general text beside."""
    by_surprise: bool = True
    dreams: bool = False
    one_level: bool = False
    """One CMS level learns; else all weights do."""
    learns: bool = True


METHODS = {
    "no sleep": Manner(learns=False),
    "fine-tuned": Manner(general=False),
    "EWC": Manner(general=False),
    "rehearsal": Manner(),
    "sleep": Manner(distills=True, one_level=True),
    "sleep, no surprise": Manner(distills=True, one_level=True, by_surprise=False),
    "sleep, dreams": Manner(distills=True, one_level=True, dreams=True),
    "sleep, all weights": Manner(distills=True),
}


@dataclass(frozen=True)
class NightSetting:
    """One try of a method."""

    lr: float
    level: int = 0
    """The CMS level that learns, from 0, if one alone does."""
    strength: float = 0.0
    """Of EWC."""

    def name(self, manner: Manner) -> str:
        """For tables."""
        parts = [f"adamw {self.lr:g}"]
        parts += [f"level {self.level + 1}"] * manner.one_level + [f"held by {self.strength:g}"] * (self.strength > 0)
        return ", ".join(parts)


def grid_of(method: str) -> dict[str, NightSetting]:
    """Two tries of each method: rates, or how hard EWC holds."""
    manner = METHODS[method]
    if method == "EWC":
        found = [NightSetting(3e-3, strength=s) for s in (1e2, 1e5)]
    else:
        found = [NightSetting(lr) for lr in ((3e-3, 1e-2) if manner.one_level else (3e-4, 3e-3))]
    return {setting.name(manner): setting for setting in found}


@dataclass(frozen=True)
class Life:
    """What all methods share: the days, the general text, and how long nights are."""

    days: tuple[np.ndarray, ...]
    """Documents [R, T + 1] of each day, read once in their order."""
    general: Callable[[int, int], Batch]
    """(number, rows) -> general text: what the model was trained on before."""
    steps: int
    batch_size: int
    capacity: int
    """Rows that the replay buffer keeps of a day."""
    begin: int
    """Token that dreams begin with."""


def sleep_through(
    model: LanguageModel,
    life: Life,
    method: str,
    setting: NightSetting,
    seed: int,
    awake: Callable[[int, int, Teacher], None],
) -> list[Snapshot]:
    """Live the days and their nights. The weights go on from night to night, the state begins anew with every document.

    Args:
        awake: told of each row (numbers of its day and of itself) when it has been read, with the teacher that has the state.

    Returns:
        The weights after each night, raw and averaged over its steps.
    """
    manner, found = METHODS[method], []
    anchors: list[tuple[Tensor, Tensor, Tensor]] = []
    for day, rows in enumerate(life.days):
        teacher = Teacher(model, draws=DRAWS, seed=1000 * seed + day)
        read = []
        for number, row in enumerate(rows):
            teacher.state = None  # documents are no longer than what pretraining has read at once
            read += teacher.wake(rows_of(row, len(row) - 1))
            awake(day, number, teacher)
        average = WeightAverage(model, FitOptions(life.steps).ema)
        if not manner.learns:
            average.update()
            found.append(snapshot(model, average, day + 1))
            continue
        penalty = None
        if setting.strength:
            rng = np.random.default_rng((seed, day, 3))
            anchors += fisher(model, lambda: _learnt_before(life, day, rng))  # noqa: B023 (used at once)
            penalty = partial(ewc_penalty, anchors, setting.strength)
        batches = _batches(teacher, read, life, manner, (seed, day))
        with learning(model, setting.level if manner.one_level else None):
            options = FitOptions(life.steps, life.batch_size, setting.lr)
            fit(model, batches, options, penalty=penalty, after=lambda steps: average.update())  # noqa: B023
        found.append(snapshot(model, average, (day + 1) * life.steps))
    return found


def _learnt_before(life: Life, day: int, rng: np.random.Generator) -> Batch:
    """A sequence of what was learnt last: pretraining's before the first night, then that of the day before."""
    if day == 0:
        return life.general(int(rng.integers(2**31)), 1)
    rows = life.days[day - 1]
    row = rows[[int(rng.integers(len(rows)))]]
    return Batch(row[:, :-1], row[:, 1:])


def _batches(
    teacher: Teacher, read: list[Experience], life: Life, manner: Manner, seed: tuple[int, int]
) -> Callable[[int], Batch]:
    """The batch of every step of a night: as many rows for every method."""
    general = life.general(seed[1], 4 * life.capacity)
    pairs = list(zip(general.tokens, general.targets))
    if manner.distills:
        buffer = ReplayBuffer(life.capacity, by_surprise=manner.by_surprise, seed=seed[0])
        for experience in read:
            buffer.add(experience)
        kinds = {"replay": Rows.of(buffer.kept())}
        if manner.dreams:
            length = len(pairs[0][0])
            kinds["dreams"] = Rows.of(list(dream(teacher, 4 * life.capacity, length, life.begin)))
        kinds["general"] = Rows.of(list(teacher.answer(pairs)))
    else:
        kinds = {"replay": Rows.of([_as_told(e) for e in read])}
        if manner.general:
            kinds["general"] = Rows.of([_as_told(Experience(x, y, y[:, None])) for x, y in pairs])
    rest = GENERAL_SHARE if manner.general else 0.0
    shares = {kind: (1 - rest) / (len(kinds) - (rest > 0)) for kind in kinds if kind != "general"}
    if rest:
        shares["general"] = rest
    priority = 1.0 if manner.distills and manner.by_surprise else 0.0
    return _drawn(NightSource(kinds, shares, priority=priority, seed=seed[0]), life.batch_size)


def night_batches(
    read: list[Experience], general: list[Experience], *, capacity: int, batch_size: int, seed: int
) -> Callable[[int], Batch]:
    """The batch of every step of a night: `general` beside the most surprising rows of `read`, each with a teacher's answers."""
    buffer = ReplayBuffer(capacity, seed=seed)
    for experience in read:
        buffer.add(experience)
    kinds = {"replay": Rows.of(buffer.kept()), "general": Rows.of(general)}
    shares = {"replay": 1 - GENERAL_SHARE, "general": GENERAL_SHARE}
    return _drawn(NightSource(kinds, shares, priority=1.0, seed=seed), batch_size)


def _drawn(source: NightSource, batch_size: int) -> Callable[[int], Batch]:
    def batch(step: int) -> Batch:
        samples = np.stack([source.sample(step * batch_size + i) for i in range(batch_size)])
        return Batch(samples[:, 0], np.where(samples[:, 1] < 0, IGNORE, samples[:, 1]))

    return batch


def _as_told(experience: Experience) -> Experience:
    return experience._replace(draws=experience.targets[:, None].astype(np.int32))


@contextmanager
def learning(model: LanguageModel, level: int | None) -> Iterator[None]:
    """All weights learn, or those of one CMS level."""
    frozen = [] if level is None else [p for name, p in model.named_parameters() if not _is_of(name, level)]
    _require(frozen, False)
    try:
        yield
    finally:
        _require(frozen, True)


def _require(parameters: Iterable[Tensor], wanted: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(wanted)


def _is_of(name: str, level: int) -> bool:
    match = _LEVEL.match(name)
    return match is not None and int(match[1]) == level
