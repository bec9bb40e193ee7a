"""Every family at every size has the parameters of HOPE at that size."""

from __future__ import annotations

import pytest

from hope_megatron.config import ConfigError, load_model_config, resolve_run_config
from hope_megatron.config.accounting import num_parameters
from hope_megatron.config.presets import family_names


@pytest.mark.parametrize("name", family_names())
def test_parameters_match_hope(name):
    model, hope = load_model_config(name), load_model_config(f"hope_{name.rpartition('_')[2]}")
    assert model.name == name
    assert num_parameters(model) == pytest.approx(num_parameters(hope), rel=0.02)
    assert all(level.hidden_size % 16 == 0 for level in model.cms.levels)


def test_families_take_overrides():
    model = load_model_config("titans_60m", ["memory.momentum=none", "num_layers=2"])
    assert model.memory.momentum == "none"
    assert model.num_layers == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.sequence_parallel=true", "set parallel.sequence_parallel=false"),
        ("parallel.context_parallel=2", "set parallel.context_parallel=1"),
        ("data.reset_at_documents=true", "set data.reset_at_documents=false"),
        ("training.seq_length=512", "set segment_tokens to at most 256"),
        ("model.layer_pattern=[attention, memory]", r"set layer_pattern=\[attention\]"),
        ("model.cms.levels=[{hidden_size: 16, inner_chunk_tokens: 8, inner_rate: 0.1}]", "leave one out"),
    ],
)
def test_segments_say_what_they_do_not_go_with(override, message):
    data = {
        "name": "test",
        "model": "armt_tiny",
        "training": {"steps": 100, "seq_length": 1024, "global_batch_size": 8},
        "data": {"train": "a", "tokenizer": "b"},
    }
    with pytest.raises(ConfigError, match=message):
        resolve_run_config(data, ["parallel.tensor_parallel=2", override], source="test")


def test_unknown_family_names_the_nearest():
    with pytest.raises(ConfigError, match="titans_60m"):
        load_model_config("titan_60m")
