"""`hope list` names what can be chosen, and every name of a registry leads somewhere."""

from __future__ import annotations

import json

import pytest

from hope_megatron.cli.list import FILES, REGISTRIES
from hope_megatron.cli.main import main
from hope_megatron.config.optimizers import OPTIMIZERS


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_entry_can_be_opened_and_says_what_it_is(kind: str) -> None:
    registry, _ = REGISTRIES[kind]
    for name, entry in registry.items():
        assert registry.open(name) is not None and entry.help


def test_all_kinds_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {*REGISTRIES, *FILES} and "hope_760m" in found["models"] and "m3" in found["optimizers"]
    assert main(["list", "formats"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("formats (hope export NAME") and "torch_dist" in shown and "models" not in shown


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_states_that_a_plan_counts_are_those_that_the_optimizer_keeps(name: str) -> None:
    kind, entry = OPTIMIZERS.open(name), OPTIMIZERS[name]
    assert (len(kind.matrix_state), len(kind.vector_state)) == (entry.matrix_states, entry.vector_states)
