"""What the first lines of configuration files claim is what the closed forms say today."""

from __future__ import annotations

import re

import pytest

from hope_megatron.config import load_model_config, load_run_config
from hope_megatron.config.accounting import num_non_embedding, num_parameters
from hope_megatron.config.hardware import find_hardware
from hope_megatron.config.presets import config_names, find_config
from hope_megatron.config.step_time import step_time


def header(kind, name):
    lines = find_config(name, kind).read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


TIMED = [name for name in config_names("runs") if "by `hope plan`" in header("runs", name)]


def test_the_runs_of_the_paper_are_timed():
    assert {"hope_760m_30b", "hope_1b3_100b", "transformer_pp_760m_30b", "transformer_pp_1b3_100b"} <= set(TIMED)


@pytest.mark.parametrize("name", TIMED)
def test_time_is_that_of_hope_plan(name):
    """tools/make_run_headers.py writes these lines."""
    text = header("runs", name)
    devices, hardware = re.search(r"Hardware: (\d+) x (\w+)", text).groups()
    about, low, high, bound = re.search(
        r"about ([\d.]+) hours by `hope plan`, ([\d.]+) to ([\d.]+); bound by (\w+)", text
    ).groups()
    config = load_run_config(name)
    found = step_time(config, int(devices), find_hardware(hardware))
    for said, seconds in ((about, found.seconds), (low, found.fastest_s), (high, found.slowest_s)):
        assert float(said) == pytest.approx(seconds * config.training.steps / 3600, rel=0.05)
    assert bound == found.bound
    assert f"data parallel {config.data_parallel(int(devices))}" in text


@pytest.mark.parametrize("name", config_names("models"))
def test_parameters_are_those_of_the_model(name):
    total, rest = re.search(r"([\d,.]+)M parameters, ([\d,.]+)M without embeddings", header("models", name)).groups()
    model = load_model_config(name)
    for said, count in ((total, num_parameters(model)), (rest, num_non_embedding(model))):
        assert float(said.replace(",", "")) == pytest.approx(count / 1e6, abs=0.051)
