"""What `hope plan` and `hope rehearse` are about: a run, or a model alone in a run of the usual shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hope_megatron.config.accounting import num_parameters
from hope_megatron.config.load import load_run_config, read_mapping, resolve_run_config
from hope_megatron.config.presets import find_config, split_family
from hope_megatron.config.run import RunConfig

TOKENS_PER_PARAMETER = 20
"""Training length of a bare model preset (Hoffmann et al., arXiv 2203.15556)."""
_NO_DATA = "no-data"
"""Stands for the data of a bare model preset."""


def load_for_plan(name_or_path: str, overrides: list[str]) -> RunConfig:
    """A run; or a model alone, put into a run of the usual shape (0.5M tokens per step, bf16, layers recomputed).

    Raises:
        ConfigError: if there is no such configuration or it is wrong.
    """
    name, model = name_or_path, name_or_path
    if split_family(name_or_path) is None:
        file = find_config(name_or_path, "runs", "models")
        if any(key.partition(".")[0] == "training" for key in read_mapping(file)):  # training.steps: 10 is a run's too
            return load_run_config(file, overrides)
        name, model = file.stem, str(file)
    data: dict[str, Any] = {
        "name": name,
        "model": model,
        "training": {"steps": 1, "seq_length": 4096, "global_batch_size": 128, "recompute": "layer"},
        "optim": {"warmup_steps": 0},
        "data": {"train": _NO_DATA, "tokenizer": _NO_DATA},
    }
    config = resolve_run_config(data, overrides, source=model)
    if config.training.steps > 1:
        return config
    steps = -(-TOKENS_PER_PARAMETER * num_parameters(config.model) // config.training.tokens_per_step)
    return config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})


def has_data(config: RunConfig) -> bool:
    """Whether it names any: a model alone does not."""
    return config.data.train != Path(_NO_DATA).absolute()
