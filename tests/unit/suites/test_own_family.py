"""A user's own family in configs/families: in suites as at the sizes of the presets, with every mistake in one line."""

from __future__ import annotations

import pytest

from hope_megatron.config import ConfigError, load_model_config
from hope_megatron.config.accounting import num_parameters
from hope_megatron.config.load import override_model
from hope_megatron.suites.models import family_model, small_hope


@pytest.fixture
def family(tmp_path, monkeypatch):
    """Writes configs/families/mine.yaml where the suites look."""
    (tmp_path / "configs/families").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return lambda text: (tmp_path / "configs/families/mine.yaml").write_text(text)


def in_suite(chunk=8):
    return family_model("mine", small_hope(64, width=64, layers=2, heads=2, chunk_tokens=chunk))


@pytest.mark.parametrize(
    ("text", "eta_max"),
    [
        ("memory: {objective: l2}", {8: 0.25, 32: 0.0625}),  # left out: the largest that is stable, 2 / chunk
        ("memory.objective: l2", {8: 0.25, 32: 0.0625}),
        ("memory: {dgd_layers: none, objective: l2, own_targets: false}", {8: 0.25, 32: 0.0625}),
        ("memory: {objective: l2, chunk_tokens: 16, eta_max: 0.0625}", {8: 0.125, 32: 0.03125}),  # half of the bound
        ("memory: {objective: l2, chunk_tokens: 16}", {8: 0.25, 32: 0.0625}),
        ("memory: {eta_max: 0.5}", {8: 0.5, 32: 0.5}),
        ("memory.eta_max: 0.5", {8: 0.5, 32: 0.5}),
    ],
)
def test_its_rate_follows_its_own_settings_not_hopes(family, text, eta_max):
    family(text)
    for chunk, rate in eta_max.items():
        model, hope = in_suite(chunk), small_hope(64, width=64, layers=2, heads=2, chunk_tokens=chunk)
        assert model.memory.eta_max == pytest.approx(rate) and model.name == "mine"
        assert num_parameters(model) == pytest.approx(num_parameters(hope), rel=0.01)


@pytest.mark.parametrize(
    "text",
    [
        "memory: {eta: fixed, decay: none}",
        "memory.eta: fixed\nmemory.decay: none",
        "memory: {eta: fixed, decay: retnet}",
    ],
)
def test_parts_that_go_with_what_is_left_out_go_too(family, text):
    family(text)
    assert not in_suite().memory.adaptive_eta and not in_suite().memory.adaptive_alpha
    assert not load_model_config("mine_tiny").memory.adaptive_eta


def test_a_rate_that_short_chunks_allow_is_refused_for_long_ones_and_why_is_said(family):
    """0.2 is below 2 / 8 and above 2 / 32: right in the suite, refused at the size of a preset."""
    family("memory: {objective: l2, eta_max: 0.2}")
    assert in_suite(8).memory.eta_max == 0.2
    with pytest.raises(ConfigError) as caught:
        load_model_config("mine_tiny")
    message = str(caught.value)
    assert message.startswith("configs/families/mine.yaml, over hope_tiny: memory.eta_max=0.2 diverges")
    assert (
        "chunk_tokens=32" in message
        and "the bound falls as chunks get longer; set eta_max to at most 0.0625" in message
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "memory: {eta_mx: 0.2}",
            ["mine.yaml", "unknown key model.memory.eta_mx", "did you mean model.memory.eta_max"],
        ),
        (
            "memory: {chunk_tokens: 16, eta_max: fast}",
            ["mine.yaml", "model.memory.eta_max must be a number, not 'fast'"],
        ),
        ("memory: {objective: L2}", ["mine.yaml", "model.memory.objective must be", "did you mean l2?"]),
        ("memory: {eta: fixed, adaptive_eta: true}", ["memory.adaptive_eta=true adds to a learned rate"]),
    ],
)
def test_its_mistakes_are_one_line_in_suites_and_presets(family, text, words):
    family(text)
    for load in (in_suite, lambda: load_model_config("mine_tiny")):
        with pytest.raises(ConfigError) as caught:
            load()
        assert len(str(caught.value).splitlines()) == 1
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_overrides_of_a_model_let_defaults_follow_too():
    """`--hope memory.objective=l2` has the rate that objective allows, not the dumped one of the other."""
    hope = small_hope(64, width=64, layers=2, heads=2, chunk_tokens=8)
    assert override_model(hope, ["memory.objective=l2"]).memory.eta_max == 0.25
    assert override_model(hope, ["memory.eta=fixed"]).memory.adaptive_eta is False
    with pytest.raises(ConfigError, match=r"memory\.eta_max=1 diverges"):
        override_model(hope, ["memory.objective=l2", "memory.eta_max=1"])
