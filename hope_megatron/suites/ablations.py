"""HOPE without one of its parts at a time, at equal parameters: the paper's table 6 at our size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hope_megatron.config.model import ModelConfig
from hope_megatron.suites.cells import train_and_test
from hope_megatron.suites.fit import FitOptions
from hope_megatron.suites.grids import settings_of
from hope_megatron.suites.guessing import guessing_of
from hope_megatron.suites.models import changed, matched
from hope_megatron.suites.recall import associative_recall
from hope_megatron.suites.size import ModelSize, described
from hope_megatron.suites.suite import Cell, Outcome, Suite, SuiteOptions, chosen
from hope_megatron.suites.task import Task
from hope_megatron.suites.text import python_text, text_source

_RATES = (("adamw", 1e-3), ("adamw", 3e-3), ("adamw", 1e-2))
_BATCH = 16

# Every part is there in the whole model, as in the paper: momentum and the memory of queries, which HOPE here has off by
# default, are on. With momentum a write of rate eta adds up to eta / (1 - theta), so the rate is bounded by half.
WHOLE: dict[str, Any] = {"memory": {"momentum": "data", "eta_max": 0.5, "adaptive_query": True}}


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
        "w/o adaptive q": {"memory": {"adaptive_query": False}},
        "w/o adaptive rates": {"memory": {"adaptive_eta": False, "adaptive_alpha": False}},
        "w/o own targets": {"memory": {"own_targets": False}},
        "rates 0": {"memory": {"eta_max": 0.0}},
    }


def build(options: SuiteOptions) -> Suite:
    """The whole model and each ablation, on text and on associative recall."""
    context = 64 if options.quick else 256
    tasks = {task.name: task for task in (text_task(context), associative_recall(4 if options.quick else 8))}
    size = ModelSize.of(options, width=32 if options.quick else 64, chunk_tokens=16)
    steps = options.steps or (100 if options.quick else 1500)

    def hope(task: Task) -> ModelConfig:
        return changed(size.hope(task.vocab_size), WHOLE)

    def config(task: Task, name: str) -> ModelConfig:
        whole = hope(task)
        model = changed(whole, ablations(whole)[name])
        return model if name == "whole" else matched(model, whole)

    names = chosen("ablation", options.families, tuple(ablations(hope(tasks["text"]))))
    grid = {s.name: s for s in settings_of(hope(tasks["text"]), options, ("own",), _RATES)}

    def run(cell: Cell) -> Outcome:
        setting = grid[cell.setting]
        fitting = FitOptions(steps, batch_size=_BATCH, lr=setting.lr, optimizer=setting.optimizer)
        return train_and_test(config(tasks[cell.task], cell.subject), tasks[cell.task], fitting, cell)

    return Suite(
        name="ablations",
        title="HOPE without one part at a time",
        tasks=chosen("task", options.tasks, tuple(tasks)),
        subjects=names,
        seeds=options.seeds,
        settings={
            "quick": options.quick,
            "context": context,
            **size.settings,
            "steps": steps,
            "batch_size": _BATCH,
            "ema": FitOptions(steps).ema,
            "rates": list(grid),
        },
        run=run,
        grid=dict.fromkeys(names, tuple(grid)),
        quantity="text: nats per byte (lower is better); recall: share of right answers (higher is better)",
        less_is_better=("text",),
        unbounded=("text",),
        notes='"rates 0" never writes.',
        **described({name: config(tasks["text"], name) for name in names}),
        guessing=guessing_of(tasks),
    )


def text_task(context: int) -> Task:
    """Next bytes of the Python standard library; asked of files that were not trained on."""
    return Task("text", 256, ("unseen files",), text_source(python_text, context), metric="loss")
