"""A suite from end to end at its smallest: cells, resuming, tables, picture; families with equal parameters."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch

from hope_megatron.config import ConfigError
from hope_megatron.config.accounting import num_parameters
from hope_megatron.suites.ablations import WHOLE, ablations
from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.fit import FitOptions, _Lessons, fit_task, small_model
from hope_megatron.suites.guessing import guessing_of, guessing_score
from hope_megatron.suites.held_out import score_test, trajectory
from hope_megatron.suites.incremental import one_of_seen
from hope_megatron.suites.models import changed, family_choices, family_model, matched, small_hope, suite_model
from hope_megatron.suites.needles import needle_tasks
from hope_megatron.suites.paper import PUBLISHED
from hope_megatron.suites.plots import plot_suite, plot_trajectories
from hope_megatron.suites.recall import draw_recall
from hope_megatron.suites.registry import SUITES, build_suite
from hope_megatron.suites.report import solved, suite_markdown, suite_outline, summarise, table
from hope_megatron.suites.results import Results
from hope_megatron.suites.running import run_suite
from hope_megatron.suites.scoring import Score
from hope_megatron.suites.selection import SELECTION_SEED, Choice
from hope_megatron.suites.splits import by_content
from hope_megatron.suites.suite import Cell, Outcome, Suite, SuiteOptions
from hope_megatron.suites.task import IGNORE, Batch, Task
from hope_megatron.suites.training_data import TrainingData


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


def test_no_family_begins_with_settings_of_its_own():
    """What suites chose for HOPE alone, and by its test score, is one of the settings that every family tries."""
    for name in ("languages", "permutations", "recall", "mad", "needles"):
        suite = build_suite(name, SuiteOptions())
        assert suite.settings["hope"] == [] and suite.seeds == 5
        assert len({len(names) for names in suite.grid.values()}) == 1 and len(next(iter(suite.grid.values()))) >= 4
        assert set(suite.subjects) == set(suite.grid)
        assert suite.num_tries == 2 * len(suite.grid["hope"])


def test_an_unknown_family_or_task_is_named():
    with pytest.raises(SuiteError, match="did you mean titans"):
        build_suite("recall", SuiteOptions(families=("titan",)))
    with pytest.raises(SuiteError, match="associative recall"):
        build_suite("recall", SuiteOptions(tasks=("associativ",)))


def fake_suite(calls: list[Cell], steps: int = 3) -> Suite:
    """Two settings; of "b" validation prefers the second, on averaged weights."""

    def run(cell: Cell) -> Outcome:
        calls.append(cell)
        if len(calls) == 6:
            raise KeyboardInterrupt
        better = cell.subject == "b" and cell.setting == "two"
        validation = {"raw": Score(0.5, 1.0), "averaged": Score(0.9 if better else 0.1, 1.0)}
        if cell.is_try:
            return Outcome(validation)
        scores = {"short": cell.seed / 2, "long": 0.25}
        return Outcome(validation, {"raw": scores, "averaged": {"short": 1.0, "long": 0.995}})

    grid = dict.fromkeys(("a", "b"), ("one", "two"))
    return Suite("s", "A suite", ("t",), ("a", "b"), 2, {"steps": steps}, run, grid)


def one_score(cell: Cell, **scores: float) -> Outcome:
    return Outcome(scores={"raw": scores or {"right": 0.25}})


def test_an_interrupted_suite_goes_on(tmp_path):
    path, calls = tmp_path / "s.json", []
    with pytest.raises(KeyboardInterrupt):
        run_suite(fake_suite(calls), path, {}, tell=lambda line: None)
    assert len(json.loads(path.read_text())["cells"]) == 5
    results = run_suite(fake_suite(calls), path, {}, tell=lambda line: None)
    assert calls == [
        Cell("t", "a", SELECTION_SEED, "one"),
        Cell("t", "a", SELECTION_SEED, "two"),
        Cell("t", "a", 0, "one"),
        Cell("t", "a", 1, "one"),
        Cell("t", "b", SELECTION_SEED, "one"),
        *2 * [Cell("t", "b", SELECTION_SEED, "two")],
        Cell("t", "b", 0, "two"),
        Cell("t", "b", 1, "two"),
    ]
    outline = suite_outline(fake_suite(calls), path)
    assert "a, b" in outline and "8, of which 8 are in" in outline and "steps                3" in outline
    assert "4 candidates per model, 4 trainings" in outline
    assert "cells                8\n" in suite_outline(fake_suite(calls), None) + "\n"
    assert results.choice("a") == Choice("one", "raw") and results.choice("b") == Choice("two", "averaged")
    text = suite_markdown(results)
    assert "0.250 [0.00, 0.50], 0.25, 0.00 |" in text  # seeds 0 and 1 of a: 0 and 0.5
    assert "| two, averaged weights | 4 " in text and "among 4 candidates for each row alike" in text
    again = Results(fake_suite([]), path)
    again.load()
    assert again.outcomes == results.outcomes and json.loads(path.read_text())["chosen"]["b"] == {
        "all tasks": "two, averaged weights",
        "t": "two, averaged weights",
    }


def test_one_setting_for_all_tasks_and_the_best_of_each():
    """Setting "x" wins on the first task and on the mean, "y" on the second: both are run there, and shown apart."""
    values = {("t", "x"): 1.0, ("t", "y"): 0.0, ("u", "x"): 0.5, ("u", "y"): 0.6}

    def run(cell: Cell) -> Outcome:
        score = Score(values[cell.task, cell.setting], 1.0)
        tested = {} if cell.is_try else {"raw": {"right": 0.3 if cell.setting == "x" else 0.4}}
        return Outcome({"raw": score, "averaged": Score(0.0, 1.0)}, tested)

    suite = Suite("s", "A suite", ("t", "u"), ("a",), 1, {}, run, {"a": ("x", "y")})
    results = run_suite(suite, None, {}, tell=lambda line: None)
    tested = [cell for cell in results.outcomes if not cell.is_try]
    assert tested == [Cell("t", "a", 0, "x"), Cell("u", "a", 0, "x"), Cell("u", "a", 0, "y")]
    assert table(results, "u").rows["a"][0].mean == 0.3 and table(results, "u", best=True).rows["a"][0].mean == 0.4
    headline, best = suite_markdown(results).split("## The best setting for each task")
    assert "y, raw" not in headline and "y, raw" in best


def test_figures_over_seeds():
    found = summarise([1.0, 1.0, 0.9, 1.0, 0.2])
    assert found[0] == pytest.approx(0.82) and (found.median, found.worst, found.seeds) == (1.0, 0.2, 5)
    # every resample has a mean of k ones, m nine tenths and n fifths; the percentiles by enumeration of all 3,125
    means = np.sort([np.mean(draw) for draw in itertools.product([1.0, 1.0, 0.9, 1.0, 0.2], repeat=5)])
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.021)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.021)
    assert summarise([2.0, 3.0], less_is_better=True).worst == 3.0
    assert summarise([0.5] * 5)[:3] == (0.5, 0.5, 0.5)


def test_a_task_is_solved_by_the_worst_of_five_seeds():
    solving, failing = summarise([1.0] * 4 + [0.99]), summarise([1.0] * 4 + [0.98])
    assert solved([solving, solving]) == "yes" and solved([solving, failing]) == "no"
    assert solved([summarise([1.0] * 4)]) == "-" and solved([solving, None]) == "-"


def test_what_other_machines_ran_is_not_run_again(tmp_path):
    def one(subject: str, steps: int = 3) -> Suite:
        return Suite("s", "A suite", ("t",), (subject,), 2, {"steps": steps}, one_score)

    for name in "ab":
        run_suite(one(name), tmp_path / f"{name}.json", {}, tell=lambda line: None)
    files, calls = [tmp_path / "a.json", tmp_path / "b.json"], []
    whole = Suite("s", "A suite", ("t",), ("a", "b"), 2, {"steps": 3}, lambda cell: calls.append(cell))
    assert "4, of which 4 are in" in suite_outline(whole, tmp_path / "s.json", files)
    results = run_suite(whole, tmp_path / "s.json", {}, files, tell=lambda line: None)
    assert not calls and set(results.outcomes) == set(results.planned())

    def three(**settings) -> Suite:
        run = lambda cell: calls.append(cell) or one_score(cell)  # noqa: E731
        return Suite("s", "A suite", ("t",), ("hope", "b", "hope: x"), 1, settings, run)

    run_suite(three(steps=3), tmp_path / "d.json", {}, tell=lambda line: None)
    calls.clear()
    run_suite(three(steps=3, hope=["a=1"]), tmp_path / "e.json", {}, [tmp_path / "d.json"], tell=lambda line: None)
    assert [cell.subject for cell in calls] == ["hope", "hope: x"]  # HOPE's own settings are no other model's
    run_suite(one("a", steps=4), tmp_path / "c.json", {}, tell=lambda line: None)
    for name, reason in (("c.json", "'steps': 4"), ("none.json", "No such file")):
        with pytest.raises(SuiteError, match=rf"(?s){name}.*{reason}"):
            run_suite(whole, None, {}, [tmp_path / name], tell=lambda line: None)


def test_the_time_left_counts_each_cell_at_its_own_cost(monkeypatch):
    """Cell a takes 10 s, b 100 s; seed 1 is expected to cost what seed 0 did."""
    clock, lines = [0.0], []

    def run(cell: Cell) -> Outcome:
        clock[0] += 10.0 if cell.task == "a" else 100.0
        return one_score(cell)

    monkeypatch.setattr("hope_megatron.suites.running.time.monotonic", lambda: clock[0])
    run_suite(Suite("s", "A suite", ("a", "b"), ("x",), 2, {}, run), None, {}, tell=lines.append)
    assert [line.split("(")[1] for line in lines] == [
        "10s, 30s left)",
        "1m 40s, 1m 50s left)",
        "10s, 1m 40s left)",
        "1m 40s, 0s left)",
    ]


def test_cells_that_follow_missing_tries_are_in_the_time_left(monkeypatch):
    clock, lines = [0.0], []

    def run(cell: Cell) -> Outcome:
        clock[0] += 10.0
        return Outcome(
            {"raw": Score(1.0, 0.0), "averaged": Score(1.0, 0.0)}, {} if cell.is_try else {"raw": {"x": 1.0}}
        )

    monkeypatch.setattr("hope_megatron.suites.running.time.monotonic", lambda: clock[0])
    grid = dict.fromkeys("ab", ("one", "two"))
    run_suite(Suite("s", "A suite", ("t",), ("a", "b"), 3, {}, run, grid), None, {}, tell=lines.append)
    assert [line.split("]")[0] for line in lines] == [f"[{i}/10" for i in range(1, 11)]
    assert lines[0].endswith("(10s, 1m 30s left)")


def test_scores_after_phases_become_a_matrix():
    scores = {"x after x": 1.0, "y after x": 2.0, "x after y": 3.0, "y after y": 4.0, "lost": 2.0}
    suite = Suite("s", "t", ("t",), ("a",), 1, {}, lambda cell: one_score(cell, **scores))
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
        lambda cell: one_score(cell, **(scores if cell.task == "shares" else losses)[cell.subject]),
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
    batch = Batch(np.zeros_like(ANSWERS), ANSWERS)
    task = Task("t", 8, ("one",), lambda split, seed: lambda name, size, rng: batch, metric=metric)
    assert guessing_score(task, "one") == pytest.approx(score)
    assert guessing_of({"t": task})("t", "forgetting") is None


def test_the_chance_level_of_classes_falls_as_they_arrive():
    groups = [["a", "b"], ["c"]]
    assert [one_of_seen(groups, column) for column in ("after 1", "after 2", "forgetting")] == [1 / 2, 1 / 3, None]


def test_the_picture_has_the_chance_level_and_the_tables_do_not(tmp_path, monkeypatch):
    levels = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda axes, values, **_: levels.append(values))
    suite = Suite("s", "t", ("t",), ("a",), 1, {}, lambda cell: one_score(cell, right=0.5, lost=0.25))
    suite = dataclasses.replace(suite, guessing=lambda task, column: 0.125 if column == "right" else None)
    results = run_suite(suite, None, {}, tell=lambda line: None)
    plot_suite(results, tmp_path / "s.png")
    assert levels[0][0] == [0.5, 0.25] and levels[0][1][0] == 0.125 and math.isnan(levels[0][1][1])
    assert "most frequent answer" not in suite_markdown(results)


def test_results_of_other_settings_are_refused(tmp_path):
    path = tmp_path / "s.json"
    Results(fake_suite([]), path).save()
    with pytest.raises(SuiteError, match="'steps': 3"):
        Results(fake_suite([], steps=4), path).load()
    path.write_text("[]")
    with pytest.raises(SuiteError, match="expected format 2"):
        Results(fake_suite([]), path).load()
    path.write_text('{"format": 2, "suite": "s"}')
    with pytest.raises(SuiteError, match="give another --json"):
        Results(fake_suite([]), path).load()


def test_cells_of_a_changed_model_are_run_again(tmp_path):
    old, new = (small_hope(64, width=32, layers=n, heads=2, chunk_tokens=8).model_dump(mode="json") for n in (1, 2))

    def suite(calls: list[Cell], **models: dict) -> Suite:
        run = lambda cell: calls.append(cell) or one_score(cell)  # noqa: E731
        return Suite("s", "A suite", ("t",), tuple(models), 1, {}, run, models=models)

    path, calls = tmp_path / "s.json", []
    run_suite(suite([], a=old, b=old), path, {}, tell=lambda line: None)
    run_suite(suite(calls, a=new, b=old), path, {}, tell=lambda line: None)
    assert calls == [Cell("t", "a", 0)]
    run_suite(suite(calls, b=old), path, {}, tell=lambda line: None)  # a row by itself leaves the others in the file
    stored = json.loads(path.read_text())
    assert stored["models"] == {"a": new, "b": old}
    del stored["models"]["a"]["memory"]["adaptive_query"]  # a field that did not exist when the record was written
    path.write_text(json.dumps(stored))
    run_suite(suite(calls, a=new, b=old), path, {}, tell=lambda line: None)
    assert calls == [Cell("t", "a", 0)]


def test_the_papers_figures_stand_beside_ours():
    """Every figure has a row and a task that its suite really has; the paper's row q is worse nowhere but in reasoning."""
    for name in ("languages", "mad", "families", "ablations"):
        suite = build_suite(name, SuiteOptions())
        assert {task for task, _ in PUBLISHED[name].figures} <= set(suite.tasks)
        assert {subject for _, subject in PUBLISHED[name].figures} <= set(suite.subjects)
    kinds = {task.name for task in needle_tasks((64,))} | {"answers right"}
    assert {task for task, _ in PUBLISHED["needles"].figures} <= kinds
    assert PUBLISHED["families"].cell("text", "hope") == "ppl 18.68, 14.39"
    found = PUBLISHED["ablations"].cell
    assert found("text", "w/o DGD") == "ppl 13.41 (+1.17, worse), acc 56.5"
    assert found("text", "w/o adaptive q") == "ppl 12.19 (-0.05, better), acc 57.4"
    assert found("text", "rates 0") == "" and set(PUBLISHED) == set(SUITES)


def recall_task(name: str, *bins: str, draw=draw_recall, lessons: tuple[str, ...] = ()) -> Task:
    return Task(name, 129, bins, by_content(draw, (*lessons, bins[0])), lessons=lessons)


def test_a_model_learns_and_is_asked():
    """The value of the only key: learnt within 300 steps, and asked of sequences never seen."""
    task = recall_task("one pair", "1 pairs")
    config = family_model("deltanet", small_hope(129, width=32, layers=1, heads=2, chunk_tokens=4))
    trained = fit_task(config, TrainingData(task, 0), FitOptions(steps=300, lr=1e-2), 0)
    assert score_test(trained, task, 0, "raw")["1 pairs"] > 0.9
    assert score_test(trained, task, 0, "averaged")["1 pairs"] > 0.9
    path = trajectory(trained, task, 0, "raw", task.bins)
    assert path["steps"][-1] == 300 and len(path["1 pairs"]) == 20
    assert path["1 pairs"][0] < 0.5 and path["1 pairs"][-1] > 0.9

    def draw_wrong(*args) -> Batch:
        tokens, targets = draw_recall(*args)
        return Batch(tokens, np.where(targets == IGNORE, IGNORE, targets - 1))

    assert score_test(trained, recall_task("wrong", "1 pairs", draw=draw_wrong), 0, "raw")["1 pairs"] < 0.1


def test_lessons_come_first_and_end():
    asked = []

    def draw(name: str, size: int, rng: np.random.Generator) -> Batch:
        asked.extend([name] * (size == 32))
        return draw_recall(name, size, rng)

    config = family_model("retnet", small_hope(129, width=16, layers=1, heads=1, chunk_tokens=4))
    draws = Task("pairs", 129, ("4 pairs",), lambda split, seed: draw, lessons=("1 pairs", "2 pairs"))
    fit_task(config, TrainingData(draws, 0), FitOptions(steps=400, lr=1e-9), 0)
    assert [len([*group]) for _, group in itertools.groupby(asked)] == [54, 54, 292]  # an eighth, at a look every 6

    lessons = _Lessons(TrainingData(draws, 0), 800)
    lessons.look(50, Score(0.94, 1.0))  # neither known nor an eighth of the steps
    assert lessons.left == ["1 pairs", "2 pairs"]
    lessons.look(100, Score(0.0, 1.0))
    assert lessons.left == ["2 pairs"]
    lessons.look(150, Score(0.95, 1.0))
    assert lessons.left == []


def test_a_real_suite_from_end_to_end(tmp_path):
    options = SuiteOptions(families=("hope", "retnet"), tasks=("a^n b^n",), seeds=1, steps=2, quick=True)
    results = run_suite(build_suite("languages", options), tmp_path / "l.json", {}, tell=lambda line: None)
    assert {cell.subject for cell in results.outcomes} == {"hope", "retnet"} and len(results.outcomes) == 4
    text = suite_markdown(results)
    assert "RetNet-like: without that paper's rotation" in text
    assert "| 2-20" in text and "retnet" in text and "100 %, longer bin 100 %" in text
    plot_suite(results, tmp_path / "l.png")
    assert plot_trajectories(results, tmp_path / "steps.png")
    for name in ("l.png", "steps.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("momentum", ["none", "data"])
def test_every_ablation_is_a_valid_model_of_equal_size(momentum):
    whole = changed(
        small_hope(256, width=64, layers=2, heads=2, chunk_tokens=16),
        {"memory": {**WHOLE["memory"], "momentum": momentum}},
    )
    for name, changes in ablations(whole).items():
        model = matched(changed(whole, changes), whole)
        assert abs(num_parameters(model) / num_parameters(whole) - 1) < 0.01, name
        if name not in ("whole", "w/o momentum"):
            assert model.memory != whole.memory or len(model.cms.levels) == 1
