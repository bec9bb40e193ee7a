"""Classes that arrive in groups: who still knows the first ones at the end?

A model is first trained to learn classes in context: episodes of sentences of some base classes, each followed by a label
that means another class in every episode; the same sentence again and again first. Then new classes arrive, a group at a time,
with labels that stay, and are learnt by one of the METHODS (`incremental_methods`). After the last group every stage is
asked about every class so far, the label chosen among those seen so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from hope_megatron.config.model import ModelConfig
from hope_megatron.suites.class_questions import stage_accuracy
from hope_megatron.suites.episodes import CLASSES_PER_GROUP, LABEL, Groups, episode_task, split_classes
from hope_megatron.suites.fit import FitOptions, Trained, Weights, fit_task
from hope_megatron.suites.grids import STARTS, settings_of, started
from hope_megatron.suites.incremental_methods import Sentences, Stage, learn_in_context, learn_in_weights
from hope_megatron.suites.incremental_sleep import learn_with_sleep
from hope_megatron.suites.labelled import Labelled, load_labelled, synthetic_labelled
from hope_megatron.suites.models import check_families, suite_model
from hope_megatron.suites.scoring import Score
from hope_megatron.suites.selection import Setting
from hope_megatron.suites.size import ModelSize, described, training_settings
from hope_megatron.suites.suite import Cell, Outcome, Scores, Suite, SuiteOptions, chosen
from hope_megatron.suites.training_data import TrainingData

METHODS = ("in context", "in context, InCA", "fine-tuned", "EWC", "with sleep")
FAMILIES = ("hope", "hope_w1", "titans", "deltanet", "gated_deltanet", "transformer_pp")
# Tries of a method, equally many for each: how memories start, how fast weights are tuned, how hard EWC holds them.
# EWC's strength multiplies mean squared gradients, which are tiny once a group is learnt.
_STARTS = ("own", "keeping")
_TUNING_RATES = (1e-3, 3e-3)
_STRENGTHS = (1e6, 1e8)
_NIGHT_RATES = (3e-3, 1e-2)
_BASE_RATE = ("m3", 1e-2)


class Try(NamedTuple):
    """A base training, and how its weights are tuned."""

    base: Setting
    tuning_rate: float = 3e-3
    strength: float = 0.0


def build(options: SuiteOptions) -> Suite:
    """Every data set named, else the synthetic one; every family by every method."""
    data = {d.name: d for d in map(load_labelled, options.data)} or {
        "synthetic": synthetic_labelled(24 if options.quick else 230)
    }
    num_groups, shots = (3, 4) if options.quick else (5, 8)
    steps, batch_size = options.steps or (100 if options.quick else 1500), 8
    size = ModelSize.of(options, width=32 if options.quick else 64, chunk_tokens=16)
    families = check_families(options.families or FAMILIES)
    tuning_steps = max(1, steps // 10)

    def config(labelled: Labelled, family: str) -> ModelConfig:
        vocab = LABEL + sum(map(len, split_classes(labelled, num_groups)[1]))
        return suite_model(family, size.hope(vocab), options.hope)

    first = next(iter(data.values()))
    grid = {
        f"{family}: {method}": tries(config(first, family), method, options)
        for family in families
        for method in METHODS
    }

    @cache
    def base(name: str, family: str, setting: Setting, seed: int) -> Trained:
        """After learning to learn: the same for every method."""
        task = episode_task(data[name], num_groups, shots)
        fitting = FitOptions(steps, batch_size, setting.lr, setting.optimizer)
        model = started(config(data[name], family), setting.start)
        return fit_task(model, TrainingData(task, seed), fitting, seed)

    def run(cell: Cell) -> Outcome:
        family, method = cell.subject.split(": ")
        this, labelled = grid[cell.subject][cell.setting], data[cell.task]
        trained = base(cell.task, family, this.base, cell.seed)
        train, validation = labelled.without_validation(cell.seed)
        base_classes, groups = split_classes(labelled, num_groups, cell.seed)
        shown = {name: train.train[name][:shots] for group in groups for name in group}
        tuning = FitOptions(tuning_steps, batch_size, this.tuning_rate)
        validated: dict[Weights, Score] = {}
        scores: dict[Weights, Scores] = {}
        for kind in trained.validation:
            model = trained.use(kind)
            if method.startswith("in context"):
                stages = learn_in_context(model, shown, groups, cell.seed)
            elif method == "with sleep":
                known = [words for name in base_classes for words in train.train[name]]
                stages = learn_with_sleep(model, shown, groups, known, tuning, cell.seed)
            else:
                stages = learn_in_weights(model, shown, groups, tuning, this.strength, cell.seed)
            asked = _Asked(trained, stages, shown, groups, method, cell.seed)
            value = float(np.mean(asked.accuracies(validation.test, stages[-1:])[0]))
            validated[kind] = Score(value, 1 - value)
            if not cell.is_try:
                scores[kind] = _scores(asked.accuracies(labelled.test, stages))
        return Outcome(validated, scores)

    return Suite(
        name="classes",
        title="Class-incremental learning",
        tasks=chosen("data set", options.tasks, tuple(data)),
        subjects=tuple(grid),
        seeds=options.seeds,
        settings={
            **_settings(options, data, size),
            "groups": num_groups,
            "shots": shots,
            "steps_per_group": tuning_steps,
            **training_settings(FitOptions(steps, batch_size)),
        },
        run=run,
        grid={subject: tuple(names) for subject, names in grid.items()},
        quantity="accuracy over all classes seen so far, after each group; forgetting: accuracy that earlier groups lost",
        less_is_better=("forgetting",),
        notes=f"At most half of the classes, {CLASSES_PER_GROUP} a group, arrive in groups; the rest are for learning to learn. "
        "Which classes are which changes with the seed.",
        parameters=described({family: config(first, family) for family in families})["parameters"],
        models=described({subject: config(first, subject.split(": ")[0]) for subject in grid})["models"],
        guessing=lambda task, column: one_of_seen(split_classes(data[task], num_groups)[1], column),
    )


def _settings(options: SuiteOptions, data: Mapping[str, Labelled], size: ModelSize) -> dict[str, Any]:
    return {
        **size.settings,
        "starts": {start: dict(STARTS[start]) for start in _STARTS},
        "tuning_rates": list(_TUNING_RATES),
        "ewc_strengths": list(_STRENGTHS),
        "night_rates": list(_NIGHT_RATES),
        "classes": {name: len(labelled.classes) for name, labelled in data.items()},
        "hope": list(options.hope),
    }


def one_of_seen(groups: Groups, column: str) -> float | None:
    """Accuracy of always naming the same class, for the column "after I" groups, whose classes are asked equally often."""
    after, _, number = column.partition(" ")
    return 1 / sum(map(len, groups[: int(number)])) if after == "after" else None


def tries(model: ModelConfig, method: str, options: SuiteOptions) -> dict[str, Try]:
    """The grid of a family and a method."""
    bases = settings_of(model, options, _STARTS, (_BASE_RATE,))
    if method.startswith("in context"):
        return {setting.name: Try(setting) for setting in bases}
    if method == "with sleep":
        found = {f"{bases[0].name}, night at {rate:g}": Try(bases[0], rate) for rate in _NIGHT_RATES}
    elif method == "fine-tuned":
        found = {f"{bases[0].name}, tuned at {rate:g}": Try(bases[0], rate) for rate in _TUNING_RATES}
    else:
        found = {f"{bases[0].name}, held by {s:g}": Try(bases[0], strength=s) for s in _STRENGTHS}
    return dict(list(found.items())[: len(bases)])


class _Asked(NamedTuple):
    """A model that has learnt, and how it is to be asked."""

    trained: Trained
    stages: list[Stage]
    shown: Sentences
    groups: Groups
    method: str
    seed: int

    def accuracies(self, sentences: Mapping[str, list[np.ndarray]], stages: list[Stage]) -> list[list[float]]:
        """Of each group so far, for each of some stages; at most 8 sentences a class, which ones changes with the seed."""
        rng = np.random.default_rng((self.seed, 5))
        picked = {
            name: [sentences[name][i] for i in rng.permutation(len(sentences[name]))[:8]]
            for group in self.groups
            for name in group
        }
        found = []
        for stage in stages:
            with torch.no_grad():
                for parameter, value in zip(self.trained.model.parameters(), stage.weights):
                    parameter.copy_(value)
            groups = [group for group in self.groups if set(group) <= set(stage.classes)]
            found.append(
                [
                    stage_accuracy(
                        self.trained.model,
                        stage,
                        {name: picked[name] for name in group},
                        self.shown if self.method.endswith("InCA") else None,
                        self.seed,
                    )
                    for group in groups
                ]
            )
        return found


def forgetting(accuracies: list[list[float]]) -> float:
    """Mean over all groups but the last: best accuracy ever minus accuracy at the end."""
    last = len(accuracies) - 1
    return float(np.mean([max(row[g] for row in accuracies[g:]) - accuracies[last][g] for g in range(last)]))


def _scores(accuracies: list[list[float]]) -> Scores:
    after = {f"after {i}": float(np.mean(row)) for i, row in enumerate(accuracies, 1)}
    return {**after, "forgetting": forgetting(accuracies)}
