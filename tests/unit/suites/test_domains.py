"""Continual pretraining: text is what it is called, windows are next bytes, and forgetting adds up."""

from __future__ import annotations

import ast

import numpy as np
import pytest
import torch

from hope_megatron.config.accounting import num_parameters
from hope_megatron.suites.domains import cms_models, named_sources, scores_by_domain
from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.fit import FitOptions, fit, small_model
from hope_megatron.suites.incremental_methods import copies
from hope_megatron.suites.models import small_hope
from hope_megatron.suites.registry import build_suite
from hope_megatron.suites.scoring import score_batch
from hope_megatron.suites.sequential import learn_in_sequence, sleep_on
from hope_megatron.suites.suite import SuiteOptions
from hope_megatron.suites.task import SPLITS, Task
from hope_megatron.suites.text import _bare, read_texts, split_text, system_text, text_source, windows
from hope_megatron.suites.training_data import TrainingData


def test_documentation_strings_and_comments_are_taken_out_of_code():
    function = b'def f():\n    """Two\n    lines."""\n    return "kept"\n'
    code = b'"""Top."""\n# note\nimport os\n' + function + b'class C:\n    """C."""\n    x = 1\n'
    bare = _bare(code)
    assert bare == b'import os\ndef f():\n    return "kept"\nclass C:\n    x = 1'
    ast.parse(bare)
    assert _bare(b"not python (") == b"not python ("


def test_held_out_text_is_not_trained_on():
    documents = tuple(b"document %d" % i for i in range(45))
    parts = [split_text(documents, split, 7).tobytes().split(b"\n\n") for split in SPLITS]
    assert sorted(document for part in parts for document in part) == sorted(documents) and [
        len(part) for part in parts
    ] == [37, 4, 4]
    assert split_text(documents, "test", 8).tobytes().split(b"\n\n") != parts[2]
    single = [split_text((bytes(range(200)),), split, 0).tobytes().replace(b"\n\n", b"") for split in SPLITS]
    assert [len(part) for part in single] == [160, 20, 20]
    assert sorted(b"".join(single)) == list(range(200))


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
    tasks = [
        Task(name, 256, ("held out",), text_source(lambda text=text: (text * 400,), 16), "loss")
        for name, text in (("b", b"ab"), ("c", b"ac"))
    ]
    config = cms_models(small_hope(256, width=16, layers=1, heads=2, chunk_tokens=8))["1 level"]
    options = FitOptions(steps=60, batch_size=4, lr=3e-2)
    trained = learn_in_sequence(config, [TrainingData(task, 0) for task in tasks], options, 0)
    scores = scores_by_domain(trained, tasks, 0, "raw")
    assert scores["b after b"] < 0.5 and scores["c after c"] < 0.5
    assert (
        scores["forgetting"] == pytest.approx(scores["b after c"] - scores["b after b"]) and scores["forgetting"] > 0.5
    )
    last = (scores["b after c"] + scores["c after c"]) / 2
    assert trained.validation["raw"].value == pytest.approx(last, abs=0.3)


def test_a_night_trains_one_level_and_brings_the_earlier_domain_back():
    """Of two levels the second alone changes; its loss on the earlier domain falls towards what it was before the new one."""
    tasks = [
        Task(name, 256, ("held out",), text_source(lambda text=text: (text * 400,), 16), "loss")
        for name, text in (("b", b"ab"), ("c", b"ac"))
    ]
    data = [TrainingData(task, 0) for task in tasks]
    model = small_model(cms_models(small_hope(256, width=16, layers=1, heads=2, chunk_tokens=8))["2 levels"], 0)
    options, weights = FitOptions(steps=40, batch_size=4, lr=3e-2), []
    for domain in data:
        fit(model, lambda step, domain=domain: domain.batch(step, 4), options)
        weights.append(copies(model))
    asked = data[0].validation(8)
    spoilt = score_batch(model, asked, "loss").value
    sleep_on(model, weights[0], data[:1], data[1], options, 0)
    assert score_batch(model, asked, "loss").value < spoilt - 0.2
    moved = {
        name
        for (name, now), then in zip(model.named_parameters(), weights[1], strict=True)
        if not torch.equal(now, then)
    }
    assert moved and all(name.startswith("layers.0.mlp.levels.1.") for name in moved)


def test_the_suite_is_there():
    suite = build_suite("domains", SuiteOptions(quick=True, families=("1 level", "deltanet")))
    assert suite.subjects == ("1 level", "deltanet") and suite.settings["domains"] == ["code", "docs", "system"]
    assert set(build_suite("domains", SuiteOptions()).subjects) >= {
        "3 levels",
        "2 levels, with sleep",
        "transformer_pp",
        "gated_deltanet",
    }
