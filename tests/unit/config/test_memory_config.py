"""The memory's settings: leaving a part out takes one key, and what is known to diverge is refused with the reason."""

from __future__ import annotations

import pytest

from hope_megatron.config import ConfigError, MemoryConfig, dump_config, load_model_config
from hope_megatron.config.strict_yaml import parse_yaml

ABLATIONS = {
    "DGD": "memory.dgd_layers=none",
    "momentum": "memory.momentum=none",
    "weight decay": "memory.decay=none",
    "CMS": "cms.levels=[{hidden_size: 512}]",
    "adaptive k": "memory.adaptive_key=false",
    "adaptive v": "memory.adaptive_value=false",
    "adaptive eta": "memory.adaptive_eta=false",
    "adaptive alpha": "memory.adaptive_alpha=false",
    "own targets": "memory.own_targets=false",
}


@pytest.mark.parametrize("override", ABLATIONS.values(), ids=ABLATIONS)
def test_an_ablation_is_one_override(override):
    base = ["memory.momentum=data"]
    model, full = load_model_config("hope_tiny", [*base, override]), load_model_config("hope_tiny", base)
    assert model != full
    assert parse_yaml(dump_config(model), "dump") == model.model_dump(mode="json")


def test_what_an_ablation_implies_is_resolved():
    assert load_model_config("hope_tiny", ["memory.decay=none"]).memory.adaptive_alpha is False
    assert load_model_config("hope_tiny", ["memory.eta=fixed"]).memory.adaptive_eta is False
    assert load_model_config("hope_tiny", ["memory.dgd_layers=none"]).memory.eta_max == 2 / 32
    assert MemoryConfig().eta_max == 1.0


@pytest.mark.parametrize(
    "settings", [{"dgd_layers": "none"}, {"objective": "l2"}, {"objective": "l2", "momentum": "data"}]
)
def test_a_rate_left_out_is_the_largest_stable_one(settings):
    assert MemoryConfig(**settings).eta_max == pytest.approx(MemoryConfig(**settings).largest_stable_eta)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"eta_max": 2.1}, "overshoots.*at most 2"),
        (
            {"objective": "l2", "eta_max": 0.5},
            r"summed, so that the bound falls as chunks get longer; set eta_max to at most 0\.0625",
        ),
        ({"objective": "l2", "chunk_tokens": 64, "eta_max": 0.0625}, r"at most 0\.03125"),
        ({"objective": "l2", "dgd_layers": "none", "eta_max": 0.07}, r"at most 0\.0625"),
        (
            {"objective": "l2", "dgd_layers": "none", "eta_max": 0.0625, "normalize_steps": False, "input_scale": 3.0},
            r"input_scale=3.*at most 0\.0138889",
        ),
        ({"objective": "l2", "momentum": "data", "eta_max": 0.0625}, r"momentum=data.*at most 0\.0127192"),
        ({"dgd_layers": "none", "eta_max": 1.0}, "nothing bounds the writes"),
        ({"dgd_layers": "input", "eta_max": 1.0}, "nothing bounds the writes"),
        ({"objective": "l2", "eta_max": 0.01, "normalize_values": False}, "normalize_values=true"),
        ({"normalize_targets": False}, "normalize_targets=true, or own_targets=false"),
        ({"decay": "none", "adaptive_alpha": True}, "adaptive_alpha=false"),
    ],
)
def test_what_diverges_is_refused_with_the_reason(settings, reason):
    with pytest.raises((ConfigError, ValueError), match=reason):
        MemoryConfig(**settings)


def test_the_delta_rule_may_turn_what_it_erases_into_its_negative():
    assert MemoryConfig().eta_max == 1.0
    assert MemoryConfig(eta_max=2.0).eta_max == 2.0


def test_silent_memories_are_never_refused():
    MemoryConfig(objective="l2", normalize_values=False, eta_max=0.0)


def test_linear_attention_has_no_bound():
    static = dict.fromkeys(["adaptive_key", "adaptive_value", "adaptive_eta", "adaptive_alpha", "own_targets"], False)
    assert MemoryConfig(num_layers=1, dgd_layers="none", eta_max=4.0, **static).eta_max == 4.0
