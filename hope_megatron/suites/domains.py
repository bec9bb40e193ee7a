"""Continual pretraining: three domains of text one after the other; how much of the first is left, by number of CMS levels?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from hope_megatron.config.accounting import num_parameters
from hope_megatron.config.model import ModelConfig
from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.fit import FitOptions, fit, fit_options, score, small_model
from hope_megatron.suites.models import changed, matched, small_hope
from hope_megatron.suites.suite import Cell, Scores, Suite, SuiteOptions, chosen
from hope_megatron.suites.task import Batch, Task
from hope_megatron.suites.text import (
    code_without_docstrings,
    docstrings,
    heldout_split,
    read_texts,
    system_text,
    windows,
)

TASK = "domains in sequence"
PERIODS = (1, 4, 16)  # optimizer steps between changes of each level, fastest first
_TEST_WINDOWS = 64

Sources = Mapping[str, Callable[[], tuple[bytes, ...]]]
OWN_TEXT: Sources = {"code": code_without_docstrings, "docs": docstrings, "system": system_text}


def build(options: SuiteOptions) -> Suite:
    """HOPE with one, two and three CMS levels of equal parameters, over the domains named, else the machine's own text."""
    sources = named_sources(options.data) or OWN_TEXT
    context = max(options.lengths or (64 if options.quick else 256,))
    fitting = fit_options(options, 50 if options.quick else 1000, batch_size=8)
    chunk, width = options.chunk_tokens or 16, options.width or (32 if options.quick else 64)
    layers, heads = options.layers or 2, options.heads or 2
    configs = cms_models(small_hope(256, width=width, layers=layers, heads=heads, chunk_tokens=chunk))
    subjects = chosen("number of levels", options.families, tuple(configs))
    tasks = [domain_task(name, source, context) for name, source in sources.items()]

    def run(cell: Cell) -> Scores:
        return learn_in_sequence(configs[cell.subject], tasks, fitting, cell.seed)

    return Suite(
        name="domains",
        title="Continual pretraining over three domains",
        tasks=(TASK,),
        subjects=subjects,
        seeds=options.seeds,
        settings={
            "quick": options.quick,
            "domains": [str(path) for path in options.data] or list(sources),
            "context": context,
            "update_period_steps": list(PERIODS),
            "width": width,
            "layers": layers,
            "heads": heads,
            "chunk_tokens": chunk,
            "steps_per_domain": fitting.steps,
            "batch_size": fitting.batch_size,
            "lr": fitting.lr,
            "optimizer": fitting.optimizer,
        },
        run=run,
        quantity="nats per held-out byte of each domain after each; forgetting: what earlier domains lost since they were learnt",
        less_is_better=(TASK,),
        unbounded=(TASK,),
        notes="Every level beyond the first changes its weights only every 4, then every 16 steps; parameters are equal.",
        parameters={name: num_parameters(configs[name]) for name in subjects},
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


def domain_task(name: str, source: Callable[[], tuple[bytes, ...]], context: int) -> Task:
    """Next bytes of a domain, "train" or "held out"."""
    parts: list[np.ndarray] = []

    def draw(bin_name: str, size: int, rng: np.random.Generator) -> Batch:
        if not parts:
            parts.extend(heldout_split(source()))
        return windows(parts[bin_name == "held out"], context, size, rng)

    return Task(name, 256, ("train", "held out"), draw, metric="loss")


def learn_in_sequence(config: ModelConfig, tasks: list[Task], options: FitOptions, seed: int) -> Scores:
    """Held-out loss of every domain after each, and the mean of what the earlier ones lost by the end."""
    model, scores = small_model(config, seed), {}
    for number, task in enumerate(tasks):
        fit(model, lambda step: task.train_batch(options.batch_size, seed + 1000 * number, step), options)  # noqa: B023
        for asked in tasks:
            scores[f"{asked.name} after {task.name}"] = score(model, asked, "held out", _TEST_WINDOWS)
    last = tasks[-1].name
    lost = [scores[f"{t.name} after {last}"] - scores[f"{t.name} after {t.name}"] for t in tasks[:-1]]
    return {**scores, "forgetting": float(np.mean(lost))}
