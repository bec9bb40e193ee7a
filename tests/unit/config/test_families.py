"""Every family at every size has the parameters of HOPE at that size."""

from __future__ import annotations

import pytest

from hope_megatron.config import ConfigError, load_model_config
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


def test_unknown_family_names_the_nearest():
    with pytest.raises(ConfigError, match="titans_60m"):
        load_model_config("titan_60m")
