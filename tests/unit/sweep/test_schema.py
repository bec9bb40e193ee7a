from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hope_megatron.config import ConfigError
from hope_megatron.sweep.schema import load_sweep

Write = Callable[..., Path]


def test_minimal_file_loads(sweep_file: Write) -> None:
    sweep = load_sweep(sweep_file())
    assert list(sweep.families) == ["hope", "transformer_pp"] and sweep.directory.name == "toy"
    assert sweep.output_dir.is_absolute()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"desgin": {}}, ["unknown key desgin", "design"]),
        ({"design": {"isoflop_budget": [1e12]}}, ["unknown key design.isoflop_budget", "isoflop_budgets"]),
        ({"design": {"tokens": [100], "isoflop_budgets": [1e12]}}, ["exclude each other"]),
        ({"design": {"tokens": [100, 100]}}, ["different positive numbers"]),
        ({"sizes": {}}, ["either widths or flops_per_token"]),
        ({"sizes": {"widths": [64, 32]}}, ["increasing order"]),
        ({"sizes": {"widths": [32, 64], "depths": [2]}}, ["each of the 2 sizes"]),
        ({"axes": {"optim.lr": [1e-3, 1e-3]}}, ["optim.lr", "different values"]),
        ({"families": {}}, ["families"]),
        ({"name": "a/b"}, ["name"]),
        ({"fit": {"level": 2.0}}, ["fit.level"]),
    ],
)
def test_mistakes_are_named(sweep_file: Write, changes: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_sweep(sweep_file(**changes))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"did you mean demo\?"):
        load_sweep("dmo")
