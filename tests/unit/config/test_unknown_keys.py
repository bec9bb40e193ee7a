"""A misspelt key, anywhere, is refused and answered with the key that was meant."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hope_megatron.config import ConfigError, RunConfig, dump_config, resolve_run_config
from hope_megatron.config.messages import key_paths
from hope_megatron.config.strict_yaml import parse_yaml

BASE: dict[str, Any] = {
    "name": "test",
    "model": "hope_tiny",
    "training": {"steps": 1000, "seq_length": 512, "global_batch_size": 8},
    "data": {
        "train": "train",
        "tokenizer": "tokenizer.model",
        "mix_with": {"more": "more"},
        "mix_schedule": [{"weights": {"train": 1.0, "more": 1.0}}],
    },
}
# with an optional section given, so that its keys are there to be misspelt
FULL = parse_yaml(dump_config(resolve_run_config(BASE, ["model.mup.base_width=256"], source="test")), "test")
# of which a level has one
OPTIONAL_CLOCKS: dict[str, Any] = {
    "update_period_adaptive": {"shortest": 1, "longest": 64, "halve_above": 0.3, "double_below": 0.0},
    "update_period_changes": [{"from_step": 8, "period": 1}],
}
PATHS = sorted(".".join(map(str, path)) for path in key_paths(RunConfig))


def misspellings(key: str) -> list[str]:
    """Usual slips: two letters swapped, one doubled, one missing, one added, plural, dashes, capitals."""
    middle = len(key) // 2
    swapped = key[: middle - 1] + key[middle] + key[middle - 1] + key[middle + 1 :]
    candidates = [swapped, key[:middle] + key[middle - 1 :], key + "s", key.upper(), key.replace("_", "-"), key + "x"]
    candidates += [key[:middle] + key[middle + 1 :]] if len(key) > 4 else []
    return sorted({text for text in candidates if text != key})


def complaint(path: str, key: str) -> str:
    """What is said when the last key of `path` is written as `key`."""
    data = copy.deepcopy(FULL)
    *sections, last = path.split(".")
    if one_of_two := [name for name in OPTIONAL_CLOCKS if name in sections]:
        data["model"]["cms"]["levels"][0] |= {name: copy.deepcopy(OPTIONAL_CLOCKS[name]) for name in one_of_two}
    node: Any = data
    for part in sections:
        node = node[int(part) if part.isdigit() else part]
    node[key] = node.pop(last)
    with pytest.raises(ConfigError) as caught:
        resolve_run_config(data, source="run.yaml")
    return str(caught.value)


@pytest.mark.parametrize("path", PATHS)
def test_every_key_of_every_section(path):
    *sections, key = path.split(".")
    siblings = {other.rpartition(".")[2] for other in PATHS if other.rpartition(".")[0] == ".".join(sections)}
    for wrong in misspellings(key):
        if wrong in siblings or wrong == "preset":
            continue
        written = ".".join([*sections, wrong])
        assert f"run.yaml: unknown key {written}; did you mean {path}?" in complaint(path, wrong), wrong


@given(path=st.sampled_from(PATHS), position=st.integers(0, 40), letter=st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
@settings(max_examples=100, deadline=None)
def test_random_slips_are_never_swallowed(path, position, letter):
    *sections, key = path.split(".")
    position %= len(key)
    wrong = key[:position] + letter + key[position + 1 :]
    if wrong == key or any(other.split(".")[-1] == wrong for other in PATHS):
        return
    message = complaint(path, wrong)
    assert f"unknown key {'.'.join([*sections, wrong])}; did you mean " in message
    assert message.split("did you mean ")[1].split("?")[0] in {p.replace("levels.0", "levels.1") for p in PATHS} | set(
        PATHS
    )


def test_key_in_the_wrong_section_is_found_in_the_right_one():
    with pytest.raises(ConfigError, match=r"unknown key training\.lr; did you mean optim\.lr\?"):
        resolve_run_config(BASE, ["training.lr=1e-3"], source="test")
    with pytest.raises(ConfigError, match=r"did you mean model\.memory\.chunk_tokens\?"):
        resolve_run_config(BASE, ["model.chunk_tokens=16"], source="test")


def test_unknown_key_in_a_list_item():
    with pytest.raises(ConfigError, match=r"levels\.1\.hiden_size; did you mean model\.cms\.levels\.1\.hidden_size\?"):
        resolve_run_config(BASE, ["model.cms.levels.1.hiden_size=16"], source="test")
