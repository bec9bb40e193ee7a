"""Continual pretraining: three domains of text one after the other; how much of the first is left, by number of CMS levels?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from hope_megatron.config.model import ModelConfig
from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.fit import FitOptions, Trained, Weights
from hope_megatron.suites.grids import settings_of
from hope_megatron.suites.held_out import score_test
from hope_megatron.suites.models import changed, family_choices, family_model, matched
from hope_megatron.suites.sequential import NIGHT_ROWS, NIGHT_SHARE, learn_in_sequence
from hope_megatron.suites.size import ModelSize, described
from hope_megatron.suites.suite import Cell, Outcome, Scores, Suite, SuiteOptions, chosen
from hope_megatron.suites.task import Task
from hope_megatron.suites.text import (
    code_without_docstrings,
    docstrings,
    read_texts,
    system_text,
    text_source,
)
from hope_megatron.suites.training_data import TrainingData

TASK = "domains in sequence"
PERIODS = (1, 4, 16)  # optimizer steps between changes of each level, fastest first
RIVALS = ("titans", "deltanet", "gated_deltanet", "transformer_pp")
ASLEEP = ", with sleep"
_TEST_WINDOWS = 64
_HELD_OUT = "held out"
_RATES = (("adamw", 1e-3), ("adamw", 3e-3), ("adamw", 1e-2))
_BATCH = 8

Sources = Mapping[str, Callable[[], tuple[bytes, ...]]]
OWN_TEXT: Sources = {"code": code_without_docstrings, "docs": docstrings, "system": system_text}


def build(options: SuiteOptions) -> Suite:
    """HOPE with one, two and three CMS levels, and other families, of equal parameters, over the domains named, else the machine's
    own text."""
    sources = named_sources(options.data) or OWN_TEXT
    context = max(options.lengths or (64 if options.quick else 256,))
    size = ModelSize.of(options, width=32 if options.quick else 64, chunk_tokens=16)
    steps = options.steps or (50 if options.quick else 1000)
    hope = size.hope(256)
    levels = cms_models(hope)
    asleep = {f"{name}{ASLEEP}": model for name, model in levels.items() if len(model.cms.levels) > 1}
    configs = {**levels, **asleep, **{family: family_model(family, hope) for family in family_choices()}}
    subjects = chosen("number of levels or family", options.families or (*levels, *asleep, *RIVALS), tuple(configs))
    grid = {s.name: s for s in settings_of(hope, options, ("own",), _RATES)}
    tasks = [Task(name, 256, (_HELD_OUT,), text_source(source, context), "loss") for name, source in sources.items()]

    def run(cell: Cell) -> Outcome:
        setting = grid[cell.setting]
        fitting = FitOptions(steps, batch_size=_BATCH, lr=setting.lr, optimizer=setting.optimizer)
        data = [TrainingData(task, cell.seed) for task in tasks]
        sleeps = cell.subject.endswith(ASLEEP)
        trained = learn_in_sequence(configs[cell.subject], data, fitting, cell.seed, sleeps=sleeps)
        if cell.is_try:
            return Outcome(trained.validation)
        return Outcome(
            trained.validation, {kind: scores_by_domain(trained, tasks, cell.seed, kind) for kind in trained.validation}
        )

    return Suite(
        name="domains",
        title="Continual pretraining over three domains",
        tasks=(TASK,),
        subjects=subjects,
        seeds=options.seeds,
        settings={
            "domains": [str(path) for path in options.data] or list(sources),
            "context": context,
            "update_period_steps": list(PERIODS),
            **size.settings,
            "steps_per_domain": steps,
            "night_share": NIGHT_SHARE,
            "night_rows": NIGHT_ROWS,
            "batch_size": _BATCH,
            "ema": FitOptions(steps).ema,
            "rates": list(grid),
        },
        run=run,
        grid=dict.fromkeys(subjects, tuple(grid)),
        quantity="nats per held-out byte of each domain after each; forgetting: what earlier domains lost since they were learnt",
        less_is_better=(TASK,),
        unbounded=(TASK,),
        notes="Every level beyond the first changes its weights only every 4, then every 16 steps; parameters are equal. "
        f"With sleep: the last {NIGHT_SHARE:.0%} of every later domain's steps distil into the second level what the model says of "
        f"{NIGHT_ROWS} rows of it with its adapted state, and what it said before the domain of {NIGHT_ROWS} rows of earlier ones. "
        "The rate is chosen by the mean validation loss over all domains at the end.",
        **described({name: configs[name] for name in subjects}),
    )


def cms_models(hope: ModelConfig) -> dict[str, ModelConfig]:
    """HOPE with one to three CMS levels, as many parameters each."""
    width = sum(level.hidden_size for level in hope.cms.levels)
    models = {}
    for count in range(1, len(PERIODS) + 1):
        levels = [{"hidden_size": max(16, width // count), "update_period_steps": period} for period in PERIODS[:count]]
        models[f"{count} level{'s' if count > 1 else ''}"] = matched(changed(hope, {"cms": {"levels": levels}}), hope)
    return models


def named_sources(paths: tuple[Path, ...]) -> Sources:
    """Domains by the names of files or directories.

    Raises:
        SuiteError: if there are fewer than two, or two of one name.
    """
    if not paths:
        return {}
    names = [path.stem for path in paths]
    if len(names) < 2 or len(set(names)) < len(names):
        raise SuiteError(f"--data {' '.join(map(str, paths))}: give two or more domains of different names")
    for path in paths:
        if not path.exists():
            raise SuiteError(f"no file or directory {path}; name text that is there")
    return {path.stem: lambda path=path: read_texts(path) for path in paths}  # type: ignore[misc]


def scores_by_domain(trained: Trained, tasks: Sequence[Task], seed: int, weights: Weights) -> Scores:
    """Test loss of every domain after each, and the mean of what the earlier ones lost by the end."""
    scores = {
        f"{asked.name} after {learnt.name}": found
        for number, learnt in enumerate(tasks)
        for asked in tasks
        for found in score_test(trained, asked, seed, weights, _TEST_WINDOWS, snapshot=number).values()
    }
    last = tasks[-1].name
    lost = [scores[f"{t.name} after {last}"] - scores[f"{t.name} after {t.name}"] for t in tasks[:-1]]
    return {**scores, "forgetting": float(np.mean(lost))}
