"""A suite from end to end at its smallest: cells, resuming, tables, picture; families with equal parameters."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hope_megatron.config import ConfigError
from hope_megatron.config.accounting import num_parameters
from hope_megatron.suites import report as suite_report
from hope_megatron.suites.ablations import WHOLE, ablations
from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.fit import FitOptions, _Lessons, fit_options, fit_task, score, small_model
from hope_megatron.suites.models import changed, family_choices, family_model, matched, small_hope, suite_model
from hope_megatron.suites.recall import draw_recall
from hope_megatron.suites.registry import build_suite
from hope_megatron.suites.report import plot_suite, suite_markdown, suite_outline, table
from hope_megatron.suites.suite import Cell, Results, Suite, SuiteOptions, run_suite
from hope_megatron.suites.task import IGNORE, Batch, Task


@pytest.mark.parametrize("family", family_choices())
def test_families_have_as_many_parameters_as_hope(family):
    hope = small_hope(128, width=64, layers=2, heads=2, chunk_tokens=8)
    model = family_model(family, hope)
    assert abs(num_parameters(model) / num_parameters(hope) - 1) < 0.01


@pytest.mark.parametrize("family", ["titans", "ttt_mlp", "ttt_linear"])
def test_a_rate_on_l2_stays_the_same_share_of_what_is_stable(family):
    shares = []
    for chunk in (1, 8, 64):
        memory = family_model(family, small_hope(128, width=64, layers=2, heads=2, chunk_tokens=chunk)).memory
        assert memory.chunk_tokens == chunk
        shares.append(memory.eta_max / memory.largest_stable_eta)
    assert shares == pytest.approx([shares[0]] * 3) and shares[0] < 1


def test_an_optimizer_comes_with_its_own_rate():
    own = {"steps": 10, "optimizer": "adamw"}
    assert fit_options(SuiteOptions(), **own) == FitOptions(10, lr=3e-3)
    assert fit_options(SuiteOptions(optimizer="m3"), **own) == FitOptions(10, lr=1e-2, optimizer="m3")
    assert fit_options(SuiteOptions(optimizer="m3", lr=0.1, steps=3), **own) == FitOptions(3, lr=0.1, optimizer="m3")
    assert build_suite("needles", SuiteOptions()).settings["optimizer"] == "m3"
    assert build_suite("needles", SuiteOptions(optimizer="adamw")).settings["lr"] == 3e-3


@pytest.mark.parametrize("family", ["linear_attention", "retnet", "deltanet", "deltanet_negative", "gated_deltanet"])
def test_the_chunk_length_of_a_matrix_memory_changes_nothing(family):
    """Outputs and every gradient, in float64, from the token-by-token model to the one that the suites train."""
    hope = small_hope(61, width=32, layers=2, heads=2, chunk_tokens=1)
    fast = family_model(family, hope)
    assert fast.memory.any_chunk and fast.memory.chunk_tokens == 64
    tokens = torch.randint(61, (3, 37), generator=torch.Generator().manual_seed(0))
    found = []
    for chunk in (1, 7, 64):
        model = small_model(changed(fast, {"memory": {"chunk_tokens": chunk}}), seed=0).double()
        logits = model(tokens).logits
        logits.square().sum().backward()
        found.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


def test_memories_that_depend_on_what_they_hold_keep_their_chunks():
    hope = small_hope(61, width=32, layers=2, heads=2, chunk_tokens=4)
    for family in ("hope", "titans", "ttt_linear", "ttt_mlp"):
        model = family_model(family, hope)
        assert not model.memory.any_chunk and model.memory.chunk_tokens == 4


def test_settings_of_hope_are_its_own():
    hope = small_hope(61, width=32, layers=2, heads=2, chunk_tokens=4)
    settings = ("memory.adaptive_key=false", "memory.eta_init=0.5")
    model = suite_model("hope", hope, settings)
    assert (model.memory.adaptive_key, model.memory.eta_init, model.memory.chunk_tokens) == (False, 0.5, 4)
    assert abs(num_parameters(model) / num_parameters(hope) - 1) < 0.01
    assert suite_model("deltanet", hope, settings) == family_model("deltanet", hope)
    other = suite_model("hope_w1", hope, settings)
    assert (other.memory.eta_init, other.memory.written_layers) == (0.5, "output")
    assert model.memory.written_layers == "all"
    with pytest.raises(ConfigError, match="did you mean"):
        suite_model("hope", hope, ("memory.eta_int=0.5",))


def test_each_language_has_the_settings_of_its_kind_and_the_users_come_last():
    settings = build_suite("languages", SuiteOptions(hope=("memory.eta_init=0.3",))).settings["hope"]
    fast = {name for name, keys in settings.items() if "memory.eta_max=2" in keys}
    assert fast == {"parity", "(aa)*", "(abab)*"} and len(settings) == 6
    assert all(keys[-1] == "memory.eta_init=0.3" for keys in settings.values())
    adding = {name for name, keys in settings.items() if "memory.dgd_layers=none" in keys}
    assert adding == {"a^n b^n c^n"}


def test_needles_begin_with_a_smaller_w2_and_less_forgetting_unless_the_user_says_otherwise():
    settings = build_suite("needles", SuiteOptions(hope=("memory.input_scale=1",))).settings["hope"]
    hope = small_hope(131, width=32, layers=1, heads=1, chunk_tokens=16)
    for keys in settings.values():
        memory = suite_model("hope", hope, keys).memory
        assert (memory.input_scale, memory.alpha_init) == (1.0, 0.99999)
    assert len(settings) == 6


def test_an_unknown_family_or_task_is_named():
    with pytest.raises(SuiteError, match="did you mean titans"):
        build_suite("recall", SuiteOptions(families=("titan",)))
    with pytest.raises(SuiteError, match="associative recall"):
        build_suite("recall", SuiteOptions(tasks=("associativ",)))


def fake_suite(calls: list[Cell], steps: int = 3) -> Suite:
    def run(cell: Cell) -> dict[str, float]:
        calls.append(cell)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"short": cell.seed / 2, "long": 0.25}

    return Suite("s", "A suite", ("t",), ("a", "b"), 2, {"steps": steps}, run)


def test_an_interrupted_suite_goes_on(tmp_path):
    path, calls = tmp_path / "s.json", []
    with pytest.raises(KeyboardInterrupt):
        run_suite(fake_suite(calls), path, {}, tell=lambda line: None)
    assert len(json.loads(path.read_text())["cells"]) == 2
    results = run_suite(fake_suite(calls), path, {}, tell=lambda line: None)
    assert calls == [Cell("t", "a", 0), Cell("t", "b", 0), Cell("t", "a", 1), Cell("t", "a", 1), Cell("t", "b", 1)]
    outline = suite_outline(fake_suite(calls), path)
    assert "a, b" in outline and "4, of which 4 are in" in outline and "steps                3" in outline
    assert "cells                4\n" in suite_outline(fake_suite(calls), None) + "\n"
    assert "0.250 ± 0.354" in suite_markdown(results)  # seeds 0 and 1: 0 and 0.5


def test_what_other_machines_ran_is_not_run_again(tmp_path):
    def one(subject: str, steps: int = 3) -> Suite:
        return Suite("s", "A suite", ("t",), (subject,), 2, {"steps": steps}, lambda cell: {"right": 0.25})

    for name in "ab":
        run_suite(one(name), tmp_path / f"{name}.json", {}, tell=lambda line: None)
    files, calls = [tmp_path / "a.json", tmp_path / "b.json"], []
    whole = fake_suite(calls)
    assert "4, of which 4 are in" in suite_outline(whole, tmp_path / "s.json", files)
    results = run_suite(whole, tmp_path / "s.json", {}, files, tell=lambda line: None)
    assert not calls and set(results.scores) == set(whole.cells())

    def three(**settings) -> Suite:
        run = lambda cell: calls.append(cell) or {"right": 0.5}  # noqa: E731
        return Suite("s", "A suite", ("t",), ("hope", "b", "hope: x"), 1, settings, run)

    run_suite(three(steps=3), tmp_path / "d.json", {}, tell=lambda line: None)
    calls.clear()
    run_suite(three(steps=3, hope=["a=1"]), tmp_path / "e.json", {}, [tmp_path / "d.json"], tell=lambda line: None)
    assert [cell.subject for cell in calls] == ["hope", "hope: x"]  # HOPE's own settings are no other model's
    run_suite(one("a", steps=4), tmp_path / "c.json", {}, tell=lambda line: None)
    for name, reason in (("c.json", "'steps': 4"), ("none.json", "No such file")):
        with pytest.raises(SuiteError, match=rf"(?s){name}.*{reason}.*leave it out of --merge"):
            run_suite(whole, None, {}, [tmp_path / name], tell=lambda line: None)


def test_the_time_left_counts_each_cell_at_its_own_cost(monkeypatch):
    """Cell a takes 10 s, b 100 s; seed 1 is expected to cost what seed 0 did."""
    clock, lines = [0.0], []

    def run(cell: Cell) -> dict[str, float]:
        clock[0] += 10.0 if cell.subject == "a" else 100.0
        return {"right": 1.0}

    monkeypatch.setattr("hope_megatron.suites.suite.time.monotonic", lambda: clock[0])
    run_suite(Suite("s", "A suite", ("t",), ("a", "b"), 2, {}, run), None, {}, tell=lines.append)
    assert [line.split("(")[1] for line in lines] == [
        "10s, 30s left)",
        "1m 40s, 1m 50s left)",
        "10s, 1m 40s left)",
        "1m 40s, 0s left)",
    ]


def test_scores_after_phases_become_a_matrix():
    scores = {"x after x": 1.0, "y after x": 2.0, "x after y": 3.0, "y after y": 4.0, "lost": 2.0}
    suite = Suite("s", "t", ("t",), ("a",), 1, {}, lambda cell: scores)
    columns, rows = table(run_suite(suite, None, {}, tell=lambda line: None), "t")
    assert columns == ["x", "y", "lost"]
    means = {name: [value and value.mean for value in row] for name, row in rows.items()}
    assert means == {"a, after x": [1.0, 2.0, None], "a, after y": [3.0, 4.0, 2.0]}


def test_the_better_is_the_brighter(monkeypatch, tmp_path):
    """In shares and in losses, in columns of both directions."""
    levels = {}
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda axes, values, **_: levels.update({len(levels): values}))
    scores = {"a": {"right": 0.75, "forgetting": 0.25}, "b": {"right": 0.5, "forgetting": 0.0}}
    losses = {"a": {"nats": 2.0}, "b": {"nats": 3.0}}
    suite = Suite(
        "s",
        "t",
        ("shares", "losses"),
        ("a", "b"),
        1,
        {},
        lambda cell: (scores if cell.task == "shares" else losses)[cell.subject],
        less_is_better=("forgetting", "losses"),
        unbounded=("losses",),
    )
    plot_suite(run_suite(suite, None, {}, tell=lambda line: None), tmp_path / "s.png")
    assert levels == {0: [[0.75, 0.75], [0.5, 1.0]], 1: [[1.0], [0.0]]}


ANSWERS = np.array([[5, 5, IGNORE], [5, 6, IGNORE], [5, 5, 7]])


@pytest.mark.parametrize(
    ("metric", "score"),
    [("answers", 5 / 7), ("sequences", 1 / 3), ("loss", -(5 / 7) * np.log(5 / 7) - 2 * (1 / 7) * np.log(1 / 7))],
)
def test_the_most_frequent_answer_is_the_chance_level(metric, score):
    task = Task("t", 8, ("one",), lambda name, size, rng: Batch(np.zeros_like(ANSWERS), ANSWERS), metric=metric)
    assert task.guessing("one") == pytest.approx(score)


def test_the_picture_has_the_chance_level_and_the_tables_do_not(tmp_path, monkeypatch):
    drawn = []
    panel = suite_report._panel
    monkeypatch.setattr(
        suite_report,
        "_panel",
        lambda axes, task, figures, suite: drawn.append(figures) or panel(axes, task, figures, suite),
    )
    suite = build_suite("recall", SuiteOptions(families=("hope",), seeds=1, steps=1, quick=True))
    task, column = suite.tasks[0], next(iter(suite.settings["bins"][suite.tasks[0]]))
    results = Results(suite, None, {Cell(task, "hope", 0): {column: 0.5, "other": 0.1}})
    plot_suite(results, tmp_path / "s.png")
    (guess, other), *_ = [row for name, row in drawn[0].rows.items() if name == "most frequent answer"]
    assert guess.mean == suite.guessing(task, column) and 0 < guess.mean < 0.5 and other is None
    assert "most frequent answer" not in suite_markdown(results)


def test_results_of_other_settings_are_refused(tmp_path):
    path = tmp_path / "s.json"
    Results(fake_suite([]), path).save()
    with pytest.raises(SuiteError, match="'steps': 3"):
        Results(fake_suite([], steps=4), path).load()
    path.write_text("[]")
    with pytest.raises(SuiteError, match="give another --json"):
        Results(fake_suite([]), path).load()


def test_a_model_learns_and_is_asked():
    """The value of the only key: learnt within 300 steps, and asked of sequences never seen."""
    task = Task("one pair", 129, ("1 pairs",), draw_recall)
    hope = small_hope(129, width=32, layers=1, heads=2, chunk_tokens=4)
    config = family_model("deltanet", hope)
    model, _ = fit_task(config, task, FitOptions(steps=300, lr=1e-2), seed=0, test_sequences=32)
    assert score(model, task, "1 pairs") > 0.9

    def draw_wrong(*args) -> Batch:
        tokens, targets = draw_recall(*args)
        return Batch(tokens, np.where(targets == IGNORE, IGNORE, targets - 1))

    assert score(model, Task("wrong", 129, ("1 pairs",), draw_wrong), "1 pairs") < 0.1


def test_lessons_come_first_and_end():
    asked = []

    def draw(name: str, size: int, rng: np.random.Generator) -> Batch:
        asked.extend([name] * (size == 32))
        return draw_recall(name, size, rng)

    hope = small_hope(129, width=16, layers=1, heads=1, chunk_tokens=4)
    task = Task("pairs", 129, ("4 pairs",), draw, lessons=("1 pairs", "2 pairs"))
    fit_task(family_model("retnet", hope), task, FitOptions(steps=400, lr=1e-9), seed=0, test_sequences=1)
    assert asked == ["1 pairs"] * 50 + ["2 pairs"] * 50 + ["4 pairs"] * 300

    lessons = _Lessons(task, 800)
    lessons.look(50, reached=0.94)  # neither known nor an eighth of the steps
    assert lessons.left == ["1 pairs", "2 pairs"]
    lessons.look(100, reached=0.0)
    assert lessons.left == ["2 pairs"]
    lessons.look(150, reached=0.95)
    assert lessons.left == []


def test_a_real_suite_from_end_to_end(tmp_path):
    options = SuiteOptions(families=("hope", "retnet"), tasks=("a^n b^n",), seeds=1, steps=2, quick=True)
    results = run_suite(build_suite("languages", options), tmp_path / "l.json", {}, tell=lambda line: None)
    assert set(results.scores) == {Cell("a^n b^n", "hope", 0), Cell("a^n b^n", "retnet", 0)}
    text = suite_markdown(results)
    assert "| 2-12" in text and "retnet" in text and "in the longer bin" in text
    plot_suite(results, tmp_path / "l.png")
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("momentum", ["none", "data"])
def test_every_ablation_is_a_valid_model_of_equal_size(momentum):
    whole = changed(
        small_hope(256, width=64, layers=2, heads=2, chunk_tokens=16), {**WHOLE, "memory": {"momentum": momentum}}
    )
    for name, changes in ablations(whole).items():
        model = matched(changed(whole, changes), whole)
        assert abs(num_parameters(model) / num_parameters(whole) - 1) < 0.01, name
        if name not in ("whole", "w/o momentum"):
            assert model.memory != whole.memory or len(model.cms.levels) == 1
