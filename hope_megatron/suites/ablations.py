"""HOPE without one of its parts at a time, at equal parameters: the paper's table 6 at our size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hope_megatron.config.accounting import num_parameters
from hope_megatron.config.model import ModelConfig
from hope_megatron.suites.fit import fit_options, fit_task, score
from hope_megatron.suites.models import changed, matched, small_hope
from hope_megatron.suites.recall import associative_recall
from hope_megatron.suites.suite import Cell, Scores, Suite, SuiteOptions, chosen
from hope_megatron.suites.task import Batch, Task
from hope_megatron.suites.text import heldout_split, python_text, windows

# Every part is there in the whole model, as in the paper: momentum, which HOPE here has off by default, is on. With it a
# write of rate eta adds up to eta / (1 - theta), so the rate is bounded by half.
WHOLE: dict[str, Any] = {"memory": {"momentum": "data", "eta_max": 0.5}}


def ablations(hope: ModelConfig) -> dict[str, Mapping[str, Any]]:
    """What is changed in the whole model, by name, as configuration keys."""
    bounded = 2.0 / hope.memory.chunk_tokens  # without the erasing term nothing else bounds a write
    width = sum(level.hidden_size for level in hope.cms.levels)
    return {
        "whole": {},
        "w/o DGD": {"memory": {"dgd_layers": "none", "eta_max": min(0.5, bounded / 2)}},
        "w/o momentum": {"memory": {"momentum": "none"}},
        "w/o writing W2": {"memory": {"written_layers": "output"}},
        "w/o weight decay": {"memory": {"decay": "none", "adaptive_alpha": False}},
        "w/o CMS": {"cms": {"levels": [{"hidden_size": width}]}},
        "w/o adaptive k": {"memory": {"adaptive_key": False}},
        "w/o adaptive v": {"memory": {"adaptive_value": False}},
        "w/o adaptive rates": {"memory": {"adaptive_eta": False, "adaptive_alpha": False}},
        "w/o own targets": {"memory": {"own_targets": False}},
        "rates 0": {"memory": {"eta_max": 0.0}},
    }


def build(options: SuiteOptions) -> Suite:
    """The whole model and each ablation, on text and on associative recall."""
    context = 64 if options.quick else 256
    tasks = {task.name: task for task in (text_task(context), associative_recall(4 if options.quick else 8))}
    fitting = fit_options(options, 100 if options.quick else 1500, batch_size=16)
    layers, heads = options.layers or 2, options.heads or 2
    chunk, width = options.chunk_tokens or 16, options.width or (32 if options.quick else 64)

    def hope(task: Task) -> ModelConfig:
        return changed(small_hope(task.vocab_size, width=width, layers=layers, heads=heads, chunk_tokens=chunk), WHOLE)

    def config(task: Task, name: str) -> ModelConfig:
        whole = hope(task)
        model = changed(whole, ablations(whole)[name])
        return model if name == "whole" else matched(model, whole)

    def run(cell: Cell) -> Scores:
        task = tasks[cell.task]
        model, _ = fit_task(config(task, cell.subject), task, fitting, cell.seed)
        return {name: score(model, task, name) for name in task.bins}

    names = chosen("ablation", options.families, tuple(ablations(hope(tasks["text"]))))
    return Suite(
        name="ablations",
        title="HOPE without one part at a time",
        tasks=chosen("task", options.tasks, tuple(tasks)),
        subjects=names,
        seeds=options.seeds,
        settings={
            "quick": options.quick,
            "context": context,
            "width": width,
            "layers": layers,
            "heads": heads,
            "chunk_tokens": chunk,
            "steps": fitting.steps,
            "batch_size": fitting.batch_size,
            "lr": fitting.lr,
            "optimizer": fitting.optimizer,
        },
        run=run,
        quantity="text: nats per byte (lower is better); recall: share of right answers (higher is better)",
        less_is_better=("text",),
        unbounded=("text",),
        paper="DGD, momentum, weight decay, CMS and each inner projection are load-bearing (table 6).",
        notes='Queries are a plain projection in every row: "w/o adaptive q" is the whole model. "rates 0" never writes.',
        parameters={name: num_parameters(config(tasks["text"], name)) for name in names},
    )


def text_task(context: int) -> Task:
    """Next bytes of the Python standard library; asked of files that were not trained on."""
    parts: list[np.ndarray] = []

    def draw(name: str, size: int, rng: np.random.Generator) -> Batch:
        if not parts:
            parts.extend(heldout_split(python_text()))
        return windows(parts[name == "unseen files"], context, size, rng)

    return Task("text", 256, ("trained files", "unseen files"), draw, metric="loss")
