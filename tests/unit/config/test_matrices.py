"""The plan's matrices against those of the built model."""

from __future__ import annotations

import pytest

from hope_megatron.config.accounting import weight_table
from hope_megatron.config.matrices.layout import in_portions, matrix_params, matrix_vectors
from hope_megatron.config.model import ModelConfig
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.model import build_model
from hope_megatron.optim.tags import read_tags
from hope_megatron.testing.tiny import tiny_run_config

STATIC = dict.fromkeys((*(f"adaptive_{x}" for x in ("key", "value", "query", "eta", "alpha")), "own_targets"), False)
MODELS = {
    "own memories, levels at two periods": {},
    "attention": {"layer_pattern": ("attention",)},
    "linear memory, gated": {"memory": {"num_layers": 1, "output_gate": "silu", **STATIC}},
}


@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_tags_are_those_of_the_model(world_of_one, name):
    config = ModelConfig(**tiny_run_config().model.model_dump() | MODELS[name])
    found = [
        (n, tuple(p.shape), read_tags(p, n, p.shape))
        for n, p in build_model(config, ParallelConfig()).named_parameters()
    ]
    assert list(matrix_params(config, 1)) == [entry for entry in found if entry[2].role == "matrix"]


@pytest.mark.parametrize(("stage", "replicas"), [(0, 4), (1, 1), (1, 3), (2, 4), (3, 3)])
def test_vectors_hold_every_matrix_once(stage, replicas):
    config = tiny_run_config().model
    numbers = sum(row.total for row in weight_table(config) if row.matrix)
    vectors = matrix_vectors(config, 1, stage, replicas)
    assert sum(run.numel for v in vectors for param in v.params for run in param.runs) == numbers
    padded = sum(v.numel for v in vectors) * (replicas if stage else 1)
    assert numbers <= padded <= numbers + replicas * 2 * len(vectors) * (20 if stage == 3 else 1)


def test_gradients_are_added_in_portions_of_bounded_size():
    assert in_portions([4, 6, 1, 50, 3], 10) == [[4, 6], [1], [50], [3]]
