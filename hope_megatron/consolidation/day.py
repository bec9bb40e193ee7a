"""The day of a run: wake files are read by the weights that the night begins with, on all ranks together."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch

from hope_megatron.consolidation.dreaming import dream
from hope_megatron.consolidation.night import Rows
from hope_megatron.consolidation.options import NightOptions
from hope_megatron.consolidation.replay import Experience, ReplayBuffer
from hope_megatron.consolidation.waking import Teacher, mean_nats
from hope_megatron.model import LanguageModel
from hope_megatron.runtime.formatting import duration_text
from hope_megatron.runtime.heartbeat import HEART

log = logging.getLogger(__name__)

Pairs = list[tuple[np.ndarray, np.ndarray]]
_JUDGED_ROWS = 64
_TELL_EVERY_S = 5.0
Item = TypeVar("Item")


def live(
    model: LanguageModel,
    options: NightOptions,
    pairs: dict[str, Pairs],
    begin: int,
    *,
    speaks: bool,
) -> tuple[dict[str, Rows], dict[str, Any]]:
    """Read, keep what surprises, dream, and answer general text.

    Args:
        pairs: rows (inputs, targets) of what is read ("wake"), and of what is judged or held ("unseen", "heldout", "general").
        begin: the token that begins a text.
        speaks: whether this rank logs progress.

    Returns:
        (rows for the night by kind, figures of the day)
    """
    teacher = Teacher(model, draws=options.draws, seed=options.seed)
    buffer = ReplayBuffer(
        options.replay, reservoir=options.reservoir, by_surprise=options.priority > 0, seed=options.seed
    )
    before, adapted = [], []
    judged = judged_rows(pairs["wake"])
    for number, experience in enumerate(_timed("reading", teacher.wake(pairs["wake"]), len(pairs["wake"]), speaks)):
        buffer.add(experience)
        if number in judged:
            before.append(experience.before)
            adapted.append(experience.adapted)
    found: dict[str, list[Experience]] = {"replay": buffer.kept()}
    if options.dreams:
        length = len(pairs["wake"][0][0])
        dreams = dream(teacher, options.dreams, length, begin)
        found["dreams"] = list(_timed("dreaming", dreams, options.dreams, speaks))
    if pairs["general"]:
        answered = teacher.answer(pairs["general"])
        found["general"] = list(_timed("general text", answered, len(pairs["general"]), speaks))
    figures: dict[str, Any] = {
        "rows_read": len(pairs["wake"]),
        "rows_kept": len(found["replay"]),
        "read": {"before": float(np.mean(before)), "adapted": float(np.mean(adapted))},
    }
    for name in ("unseen", "heldout"):
        if pairs[name]:
            figures[name] = {"before": mean_nats(model, pairs[name])}
    return {kind: Rows.of(experiences) for kind, experiences in found.items()}, figures


def judged_rows(pairs: Pairs) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Rows of the day that the morning asks about, evenly spread, by number."""
    numbers = np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), _JUDGED_ROWS)).round().astype(int))
    return {int(number): pairs[number] for number in numbers}


def morning(model: LanguageModel, figures: dict[str, Any], pairs: dict[str, Pairs]) -> dict[str, Any]:
    """The figures of the day with those after the night, the state begun anew: what remains is what was consolidated.

    `retention` is (before - after) / (before - adapted) on the documents that were read; None where adapting gained nothing.
    """
    found = {**figures, "read": {**figures["read"], "after": mean_nats(model, judged_rows(pairs["wake"]).values())}}
    for name in ("unseen", "heldout"):
        if name in figures:
            found[name] = {**figures[name], "after": mean_nats(model, pairs[name])}
    read = found["read"]
    gained = read["before"] - read["adapted"]
    found["retention"] = (read["before"] - read["after"]) / gained if gained > 0 else None
    return found


def _timed(what: str, items: Iterable[Item], count: int, speaks: bool) -> Iterator[Item]:
    """The items, with a line of progress now and then."""
    began = told = time.monotonic()
    with torch.no_grad():
        for number, item in enumerate(islice(items, count), 1):
            HEART.enter("measure", HEART.limits.evaluation_s)
            yield item
            now = time.monotonic()
            if speaks and (now - told > _TELL_EVERY_S or number == count):
                told = now
                left = (now - began) / number * (count - number)
                log.info("%s: %d of %d rows, %s left", what, number, count, duration_text(left))
