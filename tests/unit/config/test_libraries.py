"""Who computes each part of a step: chosen by what is there, said once, and never by a silent fallback."""

from __future__ import annotations

import logging
import typing

import pytest

from hope_megatron.config.libraries import LibrariesConfig
from hope_megatron.runtime import libraries, step_parts
from hope_megatron.runtime.apex import EXTENSIONS, Apex
from hope_megatron.runtime.libraries import Candidate, LibraryError, Part, Where, choices_restored, choose, find_choices
from hope_megatron.runtime.step_parts import STEP_PARTS, implementation, uses

GPU = Where("cuda", conv_channels=24)
ALL = dict.fromkeys(EXTENSIONS, True)


@pytest.fixture(autouse=True)
def nothing_chosen():
    with choices_restored():
        libraries.chosen.clear()
        yield


@pytest.fixture
def machine(monkeypatch):
    """A machine with torch.compile, and with this apex."""

    def make(provides=ALL, kind="nvidia"):
        monkeypatch.setattr(step_parts, "_compiles", lambda where: None)
        monkeypatch.setattr(step_parts, "_apex", lambda: Apex(kind=kind, location="/x/apex", provides=provides))

    return make


def names(where=GPU, **settings):
    return {choice.part: choice.library.name for choice in find_choices(STEP_PARTS, settings, where)}


def test_keys_are_the_candidates():
    keys = {name: typing.get_args(field.annotation) for name, field in LibrariesConfig.model_fields.items()}
    known = {name: tuple(candidate.name for candidate in part.candidates) for name, part in STEP_PARTS.items()}
    assert known.pop("cross_entropy") == ("own",)
    assert {name: ("auto", *candidates) for name, candidates in known.items()} == keys


def test_apex_serves_where_it_is_best(machine):
    machine()
    found = names()
    assert {part for part, name in found.items() if name == "apex"} == {"norm", "clipping", "adam", "weight_gradient"}
    assert found["attention"] == "sdpa"


def test_a_cpu_keeps_pytorch(machine):
    machine()
    assert set(names(Where("cpu")).values()) == {"torch", "own", "sdpa"}


def test_a_family_that_was_not_built_is_passed_over(machine):
    machine(provides=ALL | {"multi-tensor kernels": False})
    by_part = {choice.part: choice for choice in find_choices(STEP_PARTS, {}, GPU)}
    assert by_part["norm"].library.name == "apex" and by_part["adam"].library.name == "fused"
    assert by_part["clipping"].passed_over == ("apex: this apex was built without amp_C",)


@pytest.mark.parametrize(
    ("where", "settings", "reason"),
    [
        (Where("cpu"), {"norm": "apex"}, "norm=apex cannot serve here: there is no CUDA device"),
        (GPU._replace(cpu_offload=True), {"adam": "apex"}, "in host memory"),
        (GPU._replace(zero_stage=2), {"weight_gradient": "apex"}, "ZeRO-1"),
        (GPU._replace(learns_in_context=True), {"norm": "apex"}, "second derivative"),
        (GPU._replace(conv_taps=5), {"short_conv": "causal_conv1d"}, "2 to 4 taps, not 5"),
        (GPU._replace(deterministic=True), {"short_conv": "causal_conv1d"}, "any order"),
        (GPU, {"norm": "liger"}, "it knows auto, apex, torch"),
    ],
)
def test_a_library_that_is_named_and_cannot_serve_is_an_error(machine, monkeypatch, where, settings, reason):
    machine()
    monkeypatch.setattr(step_parts.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(LibraryError, match=reason):
        names(where, **settings)


def test_the_web_toolkit_is_not_taken_for_apex(machine):
    machine(kind="other", provides={})
    with pytest.raises(LibraryError, match="/x/apex is not NVIDIA's apex"):
        names(GPU, norm="apex")
    assert names()["norm"] == "torch"


def test_elsewhere_pytorch_is_rehearsed_and_what_is_named(machine):
    machine(kind="absent")
    found = names(GPU._replace(elsewhere=True), weight_gradient="apex")
    assert found["weight_gradient"] == "apex" and found["norm"] == "torch" and found["pointwise"] == "compile"


def test_what_does_not_load_or_is_wrong_is_passed_over_with_its_reason(caplog):
    torch = Candidate("torch", "PyTorch", "math:sqrt")
    broken = Candidate("broken", "", "math:sqrt", modules=("no_such_extension",))
    wrong = Candidate("wrong", "", "math:sqrt", check="operator:not_")  # says False, which is not None
    parts = {"norm": Part("a norm", (broken, wrong, torch))}
    with caplog.at_level(logging.INFO, "hope_megatron.runtime.libraries"):
        (choice,) = choose(parts, {}, GPU)
        choose(parts, {}, GPU)
    assert choice.library is torch and "does not load (ModuleNotFoundError" in choice.passed_over[0]
    assert len(caplog.records) == 1 and "norm  torch  PyTorch; not broken" in caplog.text
    assert uses("norm", "torch") and implementation("norm")(4.0) == 2.0
    with pytest.raises(LibraryError, match="broken cannot serve here: it is installed but does not load"):
        choose(parts, {"norm": "broken"}, GPU)
