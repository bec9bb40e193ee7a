"""Offline consolidation: days of reading, each followed by a night. What is left when the state begins anew, and at what price?

Task "facts": a model that knows a small encyclopaedia reads documents about new entities once a day; their facts are asked in other
words. Task "domain": a model of one kind of text reads some of another. `nights` has the methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from hope_megatron.consolidation.waking import Teacher
from hope_megatron.suites.encyclopaedia import EOS, READ, ROW, VOCAB, World
from hope_megatron.suites.fit import FitOptions, Trained, fit_task
from hope_megatron.suites.incremental_methods import repeat_state
from hope_megatron.suites.models import changed
from hope_megatron.suites.nights import GENERAL_SHARE, METHODS, Life, NightSetting, grid_of, sleep_through
from hope_megatron.suites.scoring import Score, on_device, score_batch
from hope_megatron.suites.size import ModelSize, described, training_settings
from hope_megatron.suites.suite import Cell, Outcome, Scores, Suite, SuiteOptions, chosen
from hope_megatron.suites.task import Batch, Draw, Split, Task
from hope_megatron.suites.text import code_without_docstrings, docstrings, split_text, text_source, windows
from hope_megatron.suites.training_data import TrainingData

FACTS, DOMAIN = "facts", "domain"
_RATE, _BATCH = 1e-2, 16  # of pretraining
_WINDOWS = 64  # of text that are scored


@dataclass(frozen=True)
class _Size:
    """How much is learnt, read and kept."""

    nights: int
    night_steps: int
    known: int
    new: int
    """New entities a day."""
    day_rows: int
    """Windows of new text a day."""
    context: int
    batch: int = 8
    keep: float = 0.5
    """Share of a day's rows that the replay buffer has room for."""


def build(options: SuiteOptions) -> Suite:
    """The methods, each on both tasks."""
    size = ModelSize.of(options, width=32 if options.quick else 64, chunk_tokens=16)
    steps = options.steps or (60 if options.quick else 900)
    much = _Size(2, 8, 12, 12, 4, 64) if options.quick else _Size(3, 60, 32, 12, 12, 128)
    # facts are not learnt from a context with rates that start low, text is learnt worse with rates that start high
    configs = {FACTS: changed(size.hope(VOCAB), {"memory": {"eta_init": 0.5}}), DOMAIN: size.hope(256)}
    subjects = chosen("method", options.families, tuple(METHODS))
    grid = {method: dict(list(grid_of(method).items())[: 1 if options.quick else None]) for method in subjects}
    fitting = FitOptions(steps, _BATCH, options.lr or _RATE, options.optimizer or "m3")

    @cache
    def base(task: str, seed: int) -> Trained:
        """Before the first day: the same for every method."""
        source = _facts_task(much) if task == FACTS else _domain_task(much)
        return fit_task(configs[task], TrainingData(source, seed), fitting, seed)

    def run(cell: Cell) -> Outcome:
        trained = base(cell.task, cell.seed)
        trial = (_FactsTrial if cell.task == FACTS else _DomainTrial)(much, cell.seed)
        return _live(trained, trial, cell, grid[cell.subject][cell.setting])

    nights = [f"night {n}" for n in range(1, much.nights + 1)]
    return Suite(
        name="consolidation",
        title="Consolidation at night",
        tasks=chosen("task", options.tasks, (FACTS, DOMAIN)),
        subjects=subjects,
        seeds=options.seeds,
        settings={
            **size.settings,
            **training_settings(fitting),
            "optimizer": fitting.optimizer,
            "rate": fitting.lr,
            "batch_size_at_night": much.batch,
            "nights": much.nights,
            "steps_per_night": much.night_steps,
            "known_entities": much.known,
            "new_entities_a_day": much.new,
            "rows_of_text_a_day": much.day_rows,
            "context": {FACTS: ROW, DOMAIN: much.context},
            "tokens_of_a_row_by_day": {FACTS: READ, DOMAIN: much.context},
            "kept_share_of_rows": much.keep,
            "general_share": GENERAL_SHARE,
        },
        run=run,
        grid={method: tuple(names) for method, names in grid.items()},
        quantity="facts: share of facts answered right; domain: change of the loss in nats per byte since before the first day",
        less_is_better=tuple(f"{name}, nats" for name in ("awake", *nights, "first day", "unseen", "general")),
        unbounded=(DOMAIN,),
        subject_kind="method",
        notes=_NOTES,
        **described(dict.fromkeys(subjects, configs[FACTS])),
    )


_NOTES = (
    "Awake: with the state that has just read the document. Night n: what all days so far brought, after that "
    "night, the state begun anew. First day: that of the first day, after the last night. Known: what was known before, after the "
    "last night; known at first: before the first day. Retention: (loss before - loss after) / (loss before - loss awake) on the "
    "documents read."
)


def _live(trained: Trained, trial: _Trial, cell: Cell, setting: NightSetting) -> Outcome:
    """All days and nights of a cell, then validation and, but for a try, the test."""
    model = trained.use("raw")
    validation, test = _Watch(trial, model, "validation"), _Watch(trial, model, "test")
    watches = [validation] if cell.is_try else [validation, test]
    start = [p.detach().clone() for p in model.parameters()]

    def awake(day: int, row: int, teacher: Teacher) -> None:
        for watch in watches:
            watch.awake += trial.awake(day, row, teacher, watch.split)

    nights = sleep_through(model, trial.life, cell.subject, setting, cell.seed, awake)
    found = Outcome({}, {})
    for kind in nights[-1].weights:
        for watch in watches:
            figures = []
            for number, night in enumerate(nights):
                _put(model, night.weights[kind])
                figures.append(trial.figures(model, number, watch.split))
            result = trial.summary(watch.before, watch.awake, figures)
            if watch is validation:
                found.validation[kind] = trial.judged(result)  # type: ignore[index]
            else:
                found.scores[kind] = result  # type: ignore[index]
    _put(model, start)
    return found


@torch.no_grad()
def _put(model: Any, weights: list[torch.Tensor]) -> None:
    for parameter, value in zip(model.parameters(), weights):
        parameter.copy_(value)


class _Watch:
    """What is seen of a life on one split."""

    def __init__(self, trial: _Trial, model: Any, split: Split) -> None:
        self.split: Split = split
        self.before = trial.figures(model, -1, split)
        self.awake: list[float] = []


class _FactsTrial:
    """Facts of an encyclopaedia."""

    def __init__(self, much: _Size, seed: int) -> None:
        self.world, self._much = _world(much, seed), much
        days = tuple(self.world.documents(d, np.random.default_rng((seed, d, 8))) for d in range(much.nights))
        self.life = Life(
            days,
            lambda number, size: _beginnings(self.world.draw(size, np.random.default_rng((seed, number, 9)))),
            much.night_steps,
            much.batch,
            round(much.keep * len(days[0])),
            EOS,
        )

    def awake(self, day: int, row: int, teacher: Teacher, split: Split) -> list[float]:
        """Share of a document's new facts that are answered with the state that has just read it; nothing of old news."""
        facts = self.world.told_in(day, row)
        if not facts:
            return []
        tokens, targets = on_device(teacher.model, self.world.questions(facts, split))
        assert teacher.state is not None
        state = repeat_state(teacher.model, teacher.state, len(tokens))
        with torch.no_grad():
            said = (
                teacher.model(tokens[:, 1:], state=state).logits[:, -1].argmax(-1)
            )  # in the stream, where no text begins
        return [(said == targets[:, -1]).double().mean().item()]

    def figures(self, model: Any, night: int, split: Split) -> Scores:
        """Shares after a night (-1: before the first)."""
        days = self.world.days
        heard = {e: values for day in days[: night + 1] for e, values in day.items()} or days[0]
        asked = {"heard": heard, "first day": days[0], "known": self.world.known}
        return {
            name: score_batch(model, self.world.questions(facts, split), "answers").value
            for name, facts in asked.items()
        }

    def summary(self, before: Scores, awake: list[float], nights: list[Scores]) -> Scores:
        """The columns."""
        by_night = {f"night {n}": found["heard"] for n, found in enumerate(nights, 1)}
        last = nights[-1]
        return {
            "before": before["heard"],
            "awake": float(np.mean(awake)),
            **by_night,
            "first day": last["first day"],
            "known": last["known"],
            "known at first": before["known"],
        }

    def judged(self, summary: Scores) -> Score:
        """New and old knowledge count alike."""
        value = (summary[f"night {self._much.nights}"] + summary["known"]) / 2
        return Score(value, 1 - value)


_code = cache(code_without_docstrings)


class _DomainTrial:
    """Text of another kind: code, after documentation."""

    def __init__(self, much: _Size, seed: int) -> None:
        self._much, self._seed = much, seed
        self._asked: dict[Split, dict[str, Batch]] = {}
        read = split_text(_code(), "training", seed)
        rng = np.random.default_rng((seed, 10))
        starts = rng.integers(0, len(read) - much.day_rows * much.context - 1, much.nights)
        length = much.context
        self._days = tuple(
            np.stack([read[s + r * length : s + (r + 1) * length + 1] for r in range(much.day_rows)]).astype(np.int64)
            for s in starts
        )
        general = text_source(docstrings, length)("training", seed)
        self.life = Life(
            self._days,
            lambda number, size: general("text", size, np.random.default_rng((seed, number, 11))),
            much.night_steps,
            much.batch,
            round(much.keep * much.day_rows),
            ord("\n"),
        )

    def awake(self, day: int, row: int, teacher: Teacher, split: Split) -> list[float]:
        """Loss of a document with the state that has read it, minus the loss without."""
        batch = Batch(self._days[day][[row], :-1], self._days[day][[row], 1:])
        tokens, targets = on_device(teacher.model, batch)
        with torch.no_grad():
            losses = [teacher.model(tokens, targets, state).losses.mean().item() for state in (teacher.state, None)]
        return [losses[0] - losses[1]]

    def figures(self, model: Any, night: int, split: Split) -> Scores:
        """Losses: of the documents of every day, of unseen text like theirs, of general text."""
        found = {}
        for day, rows in enumerate(self._days):
            found[f"day {day}"] = score_batch(model, Batch(rows[:, :-1], rows[:, 1:]), "loss").value
        for name, batch in self._held_out(split).items():
            found[name] = score_batch(model, batch, "loss").value
        return found

    def _held_out(self, split: Split) -> dict[str, Batch]:
        """The text of a split, drawn once."""
        if split not in self._asked:
            sources = {"unseen": _code, "general": docstrings}
            self._asked[split] = {
                name: windows(
                    split_text(text(), split, self._seed),
                    self._much.context,
                    _WINDOWS,
                    np.random.default_rng((self._seed, 12)),
                )
                for name, text in sources.items()
            }
        return self._asked[split]

    def summary(self, before: Scores, awake: list[float], nights: list[Scores]) -> Scores:
        """The columns: changes since before the first day."""
        change = [{name: found[name] - before[name] for name in before} for found in nights]
        read = [[found[f"day {day}"] for day in range(n)] for n, found in enumerate(change, 1)]
        gained = float(np.mean(awake))
        return {
            "awake, nats": gained,
            **{f"night {n}, nats": float(np.mean(days)) for n, days in enumerate(read, 1)},
            "first day, nats": read[-1][0],
            "unseen, nats": change[-1]["unseen"],
            "general, nats": change[-1]["general"],
            "retention": float(np.mean(read[-1])) / gained if gained < 0 else float("nan"),
        }

    def judged(self, summary: Scores) -> Score:
        """New and old text count alike, and unseen text like the read one."""
        nats = (summary["unseen, nats"] + summary["general, nats"]) / 2
        return Score(-nats, nats)


def _beginnings(batch: Batch) -> Batch:
    """Rows as long as what is read by day."""
    return Batch(batch.tokens[:, :READ], batch.targets[:, :READ])


_Trial = _FactsTrial | _DomainTrial


def _world(much: _Size, seed: int) -> World:
    return World.of(seed, known=much.known, days=much.nights, new=much.new)


def _facts_task(much: _Size) -> Task:
    """Pretraining of the encyclopaedia. Validation is about the same known entities: there is no other text that would say them."""

    def source(split: Split, seed: int) -> Draw:
        world = _world(much, seed)
        return lambda name, size, rng: world.draw(size, rng)

    return Task(FACTS, VOCAB, ("rows",), source, "loss")


def _domain_task(much: _Size) -> Task:
    return Task(DOMAIN, 256, ("held out",), text_source(docstrings, much.context), "loss")
