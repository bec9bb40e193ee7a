"""The protocol: three disjoint splits, choices on validation data alone, a test that is read once and after training."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest
import torch

from hope_megatron.suites import fit as fit_module
from hope_megatron.suites.ablations import text_task
from hope_megatron.suites.cells import train_and_test
from hope_megatron.suites.errors import SuiteError
from hope_megatron.suites.fit import FitOptions, WeightAverage, fit_task, small_model
from hope_megatron.suites.grids import BOTH, STARTS, settings_of, started
from hope_megatron.suites.held_out import score_test
from hope_megatron.suites.languages import LANGUAGES, language_tasks
from hope_megatron.suites.mad import mad_tasks
from hope_megatron.suites.models import family_choices, family_model, small_hope
from hope_megatron.suites.needles import needle_tasks
from hope_megatron.suites.permutations import permutation_tasks
from hope_megatron.suites.recall import recall_tasks
from hope_megatron.suites.scoring import Score
from hope_megatron.suites.selection import Choice, choose
from hope_megatron.suites.splits import HELD_OUT, dealt, split_of
from hope_megatron.suites.suite import Cell, SuiteOptions
from hope_megatron.suites.task import PAD, SPLITS, Batch, Task
from hope_megatron.suites.training_data import TrainingData

TASKS = {
    task.name: task
    for task in [
        *language_tasks(20),
        *permutation_tasks(6),
        *recall_tasks(8, 4),
        *mad_tasks(32),
        *needle_tasks((64, 128)),
    ]
}


def contents(batch: Batch) -> set[bytes]:
    """Every sequence without its padding."""
    return {np.trim_zeros(row, "b").tobytes() for row in batch.tokens}


def all_drawn(task: Task, split: str, seed: int, bins: tuple[str, ...], size: int = 300) -> set[bytes]:
    draw = task.source(split, seed)
    return set().union(*(contents(draw(name, size, np.random.default_rng((seed, 9)))) for name in bins))


@pytest.mark.parametrize("name", TASKS)
def test_splits_are_disjoint(name):
    """Drawn with the same random numbers for every split, so that nothing but the split keeps them apart."""
    task = TASKS[name]
    train, validation = (all_drawn(task, split, 3, task.trained) for split in ("training", "validation"))
    test = all_drawn(task, "test", 3, task.bins)
    assert train and validation and test
    assert not train & validation and not train & test and not validation & test


@pytest.mark.parametrize("name", [name for name, language in LANGUAGES.items() if language.one_per_length])
def test_the_strings_of_a_finite_language_are_dealt_out_and_all_asked(name):
    task, language = TASKS[name], LANGUAGES[name]
    for seed in range(6):
        parts = [all_drawn(task, split, seed, task.bins[:1], 2000) for split in SPLITS]
        assert sum(map(len, parts)) == len(set().union(*parts)) == len(language.lengths(task.bins[0]))
        lengths = [{len(content) // 8 - 1 for content in part} for part in parts]
        ends = language.lengths(task.bins[0])[0], language.lengths(task.bins[0])[-1]
        assert set(ends) <= lengths[0]  # what is held out lies between trained lengths
    beyond = task.source("test", 0)(task.bins[1], 1, np.random.default_rng(0))
    assert len(contents(beyond)) == len(beyond.tokens) == len(language.lengths(task.bins[1]))


def test_other_seeds_hold_out_other_sequences():
    task = TASKS["associative recall"]
    held = [all_drawn(task, "test", seed, task.bins[:1]) for seed in (0, 1)]
    assert not held[0] & held[1]
    tokens = [np.array([5, 6, n, PAD, PAD]) for n in range(7, 2000)]
    shares = [np.mean([split_of(row, 0) == split for row in tokens]) for split in SPLITS]
    assert shares == pytest.approx([1 - 2 * HELD_OUT, HELD_OUT, HELD_OUT], abs=0.03)
    assert [split_of(row, 0) for row in tokens] != [split_of(row, 1) for row in tokens]
    assert all(split_of(row, 0) == split_of(row[:3], 0) for row in tokens)  # padding is no content


def test_too_few_items_to_divide_are_refused():
    assert [len(dealt("abcde", split, 0)) for split in SPLITS] == [3, 1, 1]
    with pytest.raises(SuiteError, match="2 items cannot be divided"):
        dealt("ab", "test", 0)
    with pytest.raises(SuiteError, match="too few sequences"):
        language_tasks(2)[0].source("validation", 0)("2-2", 2, _Stuck())


class _Stuck:
    """Random numbers that always say the same."""

    def choice(self, lengths, size):
        return np.full(size, lengths[0])

    def integers(self, low, high, size):
        return np.zeros(size, int)


def test_text_is_divided_by_document(monkeypatch):
    documents = tuple(b"%c" % (33 + i) * 500 for i in range(60))
    monkeypatch.setattr("hope_megatron.suites.ablations.python_text", lambda: documents)
    source = text_task(32).source
    found = [set(source(split, 1)("unseen files", 400, np.random.default_rng(0)).tokens.ravel()) for split in SPLITS]
    separator = {10}
    assert found[0] & found[1] <= separator and found[0] & found[2] <= separator and found[1] & found[2] <= separator


def test_training_data_refuses_what_is_for_the_test():
    task = TASKS["parity"]
    data = TrainingData(task, 0)
    for name in task.bins[1:]:
        with pytest.raises(SuiteError, match="is not trained; training sees 2-20"):
            data.batch(0, 4, name)
        with pytest.raises(SuiteError, match="is not trained"):
            data.validation(4, name)
        for split in ("training", "validation"):
            with pytest.raises(SuiteError, match="for the test alone"):
                task.source(split, 0)(name, 4, np.random.default_rng(0))
    first, again, other = (TrainingData(task, seed).batch(3, 8) for seed in (1, 1, 2))
    assert np.array_equal(first.tokens, again.tokens) and not np.array_equal(first.tokens, other.tokens)


def test_training_takes_no_task_and_knows_no_test():
    """The type says so; pyproject.toml has the import contract, which test_imports.py runs."""
    parameters = inspect.signature(fit_task, eval_str=True).parameters
    assert parameters["data"].annotation is TrainingData
    assert not any(parameter.annotation is Task for parameter in parameters.values())
    assert "held_out" not in vars(fit_module) and "score_test" not in vars(fit_module)


def test_the_test_is_drawn_after_the_last_step_and_read_once():
    drawn: list[tuple[str, str]] = []
    task = TASKS["copying"]

    def source(split, seed):
        draw = task.source(split, seed)
        return lambda name, size, rng: drawn.append((split, name)) or draw(name, size, rng)

    watched = dataclasses.replace(task, source=source)
    hope = small_hope(task.vocab_size, width=16, layers=1, heads=1, chunk_tokens=8)
    config, options = family_model("deltanet", hope), FitOptions(steps=40, lr=1e-3)
    trained = fit_task(config, TrainingData(watched, 0), options, 0)
    assert {split for split, _ in drawn} == {"training", "validation"}
    assert {name for _, name in drawn} == set(task.trained)
    drawn.clear()
    score_test(trained, watched, 0, "raw", 8)
    assert drawn == [("test", name) for name in task.bins]
    with pytest.raises(SuiteError, match="read once"):
        score_test(trained, watched, 0, "raw", 8)
    drawn.clear()
    tried = train_and_test(config, watched, options, Cell("copying", "deltanet", 1000), 8)
    assert "test" not in {split for split, _ in drawn}
    assert tried.validation and not tried.scores and not tried.trajectory


def test_no_score_ends_a_training():
    """A task that is solved from the first step on is trained for all of its steps."""
    steps = []

    def draw(name: str, size: int, rng: np.random.Generator) -> Batch:
        return Batch(np.ones((size, 4), np.int64), np.ones((size, 4), np.int64))

    def source(split, seed):
        return lambda name, size, rng: steps.append(split) or draw(name, size, rng)

    config = family_model("retnet", small_hope(16, width=16, layers=1, heads=1, chunk_tokens=4))
    trained = fit_task(config, TrainingData(Task("ones", 16, ("all",), source), 0), FitOptions(60, lr=1e-2), 0)
    assert steps.count("training") == 60 and trained.validation["raw"].value == 1.0
    assert [snapshot.step for snapshot in trained.snapshots] == list(range(3, 61, 3))


def test_the_average_of_weights_is_that_of_the_steps():
    model = small_model(family_model("retnet", small_hope(16, width=16, layers=1, heads=1, chunk_tokens=4)), 0)
    average, seen = WeightAverage(model, 0.9), []
    parameter = next(iter(model.parameters()))
    for step in range(5):
        with torch.no_grad():
            parameter.add_(float(step))
        average.update()
        seen.append(parameter.detach().clone())
    weights = torch.tensor([0.9 ** (4 - i) for i in range(5)])
    expected = sum(w * value for w, value in zip(weights / weights.sum(), seen))
    torch.testing.assert_close(average.values()[0], expected, rtol=1e-5, atol=1e-6)


def test_validation_chooses_and_loss_decides_ties():
    def tries(*scores: tuple[float, float, float, float]) -> dict:
        """Value and loss of raw weights, then of averaged ones, by setting."""
        return {
            ("t", f"s{i}"): {"raw": Score(*four[:2]), "averaged": Score(*four[2:])} for i, four in enumerate(scores)
        }

    assert choose(tries((0.5, 1, 0.6, 1), (0.9, 1, 0.2, 1)), ["t"]) == Choice("s1", "raw")
    assert choose(tries((0.9, 2, 0.9, 1), (0.9, 3, 0.9, 4)), ["t"]) == Choice("s0", "averaged")
    losses = tries((2.0, 2, 3.0, 3), (1.5, 1.5, 9, 9))
    assert choose(losses, ["t"], ("t",)) == Choice("s1", "raw")
    diverged = tries((float("nan"), float("nan"), 0.1, 9), (0.05, 1, float("nan"), 1))
    assert choose(diverged, ["t"]) == Choice("s0", "averaged")
    two = {("t", "a"): 1.0, ("u", "a"): 0.0, ("t", "b"): 0.6, ("u", "b"): 0.6}
    two_tasks = {key: dict.fromkeys(("raw", "averaged"), Score(value, 1)) for key, value in two.items()}
    assert choose(two_tasks, ["t", "u"]).setting == "b" and choose(two_tasks, ["t"]).setting == "a"


@pytest.mark.parametrize("family", family_choices())
def test_every_family_has_as_many_different_tries(family):
    model = family_model(family, small_hope(64, width=32, layers=2, heads=2, chunk_tokens=1))
    grid = settings_of(model, SuiteOptions(), ("own", "forgetting", "adding"), BOTH)
    trained = {(s.optimizer, s.lr, started(model, s.start).model_dump_json()) for s in grid}
    assert len(grid) == len(trained) == 6 and len({s.name for s in grid}) == 6
    if model.memory.eta == "data" and "memory" in model.layer_pattern:
        slow = started(model, "adding").memory
        assert slow.eta_max == pytest.approx(STARTS["adding"]["eta_factor"] * model.memory.eta_max)
    assert len(settings_of(model, SuiteOptions(lr=0.1, optimizer="muon"), ("own", "adding"), BOTH)) == 2
    assert len(settings_of(model, SuiteOptions(quick=True), ("own", "adding"), BOTH)) == 1
