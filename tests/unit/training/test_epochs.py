"""How often a run reads its data, and what repeated tokens are worth."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from hope_megatron.testing.tiny import RepeatingSource, tiny_run_config
from hope_megatron.training.epochs import Passes, passes_over, passes_text, planned_passes, repetition_warning


@pytest.mark.parametrize(
    ("epochs", "worth"),
    [
        (0.5, 0.5),
        (1, 1.0),
        (2, 1 + 15.387756 * (1 - math.exp(-1 / 15.387756))),  # 1.97: equation 5 of arXiv 2305.16264
        (4, 3.72567),
        (16.387756, 1 + 15.387756 * (1 - math.exp(-1))),
        (6055, 16.3878),
    ],
)
def test_worth_follows_the_data_constrained_law(epochs, worth):
    passes = Passes("train", 10**9, round(epochs * 10**9))
    assert passes.epochs == pytest.approx(epochs)
    assert passes.worth_tokens / 1e9 == pytest.approx(worth, rel=1e-4)


def test_the_case_of_the_issue_is_said():
    passes = [Passes("train", 4_955_000, 30_000_000_000)]
    assert passes_text(passes) == "6,054 epochs of train (4,955,000 tokens)"
    warning = repetition_warning(passes)
    assert "6,054 epochs" in warning and "about 81,201," in warning and "4 epochs are 19,820,000 tokens" in warning
    assert repetition_warning([Passes("train", 1000, 4000)]) is None
    assert repetition_warning([Passes("train", 1000, 1), Passes("more", 1000, 4100)]).startswith("4.1 epochs of more")


def test_a_plain_source_a_mixture_and_a_transition_are_counted():
    first, second = RepeatingSource(num_samples=100), RepeatingSource(num_samples=10)
    mixture = SimpleNamespace(
        datasets={"train": first, "more": second},
        counts=lambda number: {"train": number // 4, "more": number - number // 4},
    )
    assert [one.epochs for one in passes_over(first, 250)] == [2.5]
    assert {one.name: one.epochs for one in passes_over(mixture, 40)} == {"train": 0.1, "more": 3.0}
    moved = SimpleNamespace(stream=second, start=30)
    assert [one.epochs for one in passes_over(moved, 45)] == [1.5]
    assert [one.epochs for one in passes_over(moved, 20)] == [0.0]


def test_steps_to_come_have_the_batch_of_today():
    config = tiny_run_config(training={"steps": 10, "global_batch_size": 8})
    (passes,) = planned_passes(RepeatingSource(num_samples=100), config)
    assert passes.tokens == 80 * 16
    (passes,) = planned_passes(RepeatingSource(num_samples=100), config, samples_done=20, step=5)
    assert passes.tokens == 60 * 16
