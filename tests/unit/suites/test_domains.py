"""Continual pretraining: text is what it is called, windows are next bytes, and forgetting adds up."""

from __future__ import annotations

import ast

import numpy as np
import pytest

from hope_megatron.config.accounting import num_parameters
from hope_megatron.suites.domains import cms_models, domain_task, learn_in_sequence, named_sources
from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.fit import FitOptions
from hope_megatron.suites.models import small_hope
from hope_megatron.suites.registry import build_suite
from hope_megatron.suites.suite import SuiteOptions
from hope_megatron.suites.text import _bare, heldout_split, read_texts, system_text, windows


def test_documentation_strings_and_comments_are_taken_out_of_code():
    function = b'def f():\n    """Two\n    lines."""\n    return "kept"\n'
    code = b'"""Top."""\n# note\nimport os\n' + function + b'class C:\n    """C."""\n    x = 1\n'
    bare = _bare(code)
    assert bare == b'import os\ndef f():\n    return "kept"\nclass C:\n    x = 1'
    ast.parse(bare)
    assert _bare(b"not python (") == b"not python ("


def test_held_out_text_is_not_trained_on():
    documents = tuple(b"document %d" % i for i in range(45))
    train, held = (part.tobytes().split(b"\n\n") for part in heldout_split(documents))
    assert held == [documents[0], documents[20], documents[40]] and not set(train) & set(held)
    assert len(train) + len(held) == 45
    single = heldout_split((b"x" * 950 + b"y" * 50,))
    assert single[0].tobytes() == b"x" * 950 and single[1].tobytes() == b"y" * 50


def test_targets_are_the_next_bytes():
    data = np.arange(200, dtype=np.uint8)
    batch = windows(data, 16, 5, np.random.default_rng(0))
    assert batch.tokens.shape == batch.targets.shape == (5, 16)
    assert (batch.targets == batch.tokens + 1).all()
    with pytest.raises(SuiteError, match="give more text"):
        windows(data, 200, 1, np.random.default_rng(0))


def test_named_domains(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(f"text of {name}")
    (tmp_path / "b" / "image.bin").write_bytes(b"\0\1")
    sources = named_sources((tmp_path / "a", tmp_path / "b"))
    assert [source() for source in sources.values()] == [(b"text of a",), (b"text of b",)]
    assert read_texts(tmp_path) == (b"text of a", b"text of b")
    assert len(system_text()) >= 1
    for paths, message in (((tmp_path / "a",), "two or more"), ((tmp_path / "a", tmp_path / "c"), "no file")):
        with pytest.raises(SuiteError, match=message):
            named_sources(paths)


def test_levels_have_equal_parameters_and_slower_clocks():
    hope = small_hope(256, width=64, layers=2, heads=2, chunk_tokens=16)
    models = cms_models(hope)
    assert [[level.update_period_steps for level in m.cms.levels] for m in models.values()] == [[1], [1, 4], [1, 4, 16]]
    assert all(abs(num_parameters(m) / num_parameters(hope) - 1) < 0.01 for m in models.values())


def test_a_domain_that_contradicts_the_first_is_learnt_over_it():
    """In one domain a is followed by b, in the other by c: learning the second must cost the first."""
    tasks = [domain_task(name, lambda text=text: (text * 400,), 16) for name, text in (("b", b"ab"), ("c", b"ac"))]
    config = cms_models(small_hope(256, width=16, layers=1, heads=2, chunk_tokens=8))["1 level"]
    scores = learn_in_sequence(config, tasks, FitOptions(steps=60, batch_size=4, lr=3e-2), 0)
    assert scores["b after b"] < 0.5 and scores["c after c"] < 0.5
    assert (
        scores["forgetting"] == pytest.approx(scores["b after c"] - scores["b after b"]) and scores["forgetting"] > 0.5
    )


def test_the_suite_is_there():
    suite = build_suite("domains", SuiteOptions(quick=True, families=("1 level", "3 levels")))
    assert suite.subjects == ("1 level", "3 levels") and suite.settings["domains"] == ["code", "docs", "system"]
