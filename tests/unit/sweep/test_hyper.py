from __future__ import annotations

import numpy as np
import pytest

from hope_megatron.sweep.hyper import Trial, fit_tuning, grid_steps_moved, tuned_batch, tuned_lr


def trials(
    lr_law,
    batch_law=lambda n, d: 2.0**18,
    *,
    noise: float = 0.0,
    batches=(1.0,),
    sizes=(1e8, 4e8, 16e8),
    lengths=(20, 80),
) -> list[Trial]:
    """Runs around the given optima: loss = 3 + log-quadratic in lr and batch."""
    rng = np.random.default_rng(0)
    made = []
    for n in sizes:
        for ratio in lengths:
            d = ratio * n
            for lr in 2.0 ** np.arange(-14, -4):
                for batch in np.array(batches) * 2.0**18:
                    loss = 3 + 0.02 * np.log(lr / lr_law(n, d)) ** 2 + 0.01 * np.log(batch / batch_law(n, d)) ** 2
                    made.append(Trial(n, d, 6 * n * d, int(n**0.5), lr, batch, loss + noise * rng.normal()))
    return made


def test_law_of_compute_is_recovered() -> None:
    """DeepSeek LLM (arXiv 2401.02954, section 3.1): lr = 0.3118 C^-0.1250."""
    made = trials(lambda n, d: 0.3118 * (6 * n * d) ** -0.1250)
    law = fit_tuning(tuned_lr(made), count=50, level=0.9, seed=0)
    assert law is not None
    assert (law.point.by_compute.factor, law.point.by_compute.exponent) == pytest.approx((0.3118, -0.1250), rel=1e-6)


def test_law_of_size_and_tokens_is_recovered() -> None:
    """Step Law (arXiv 2503.04715): lr = 1.79 N^-0.713 D^0.307, with an interval under noise."""
    made = trials(lambda n, d: 1.79 * n**-0.713 * d**0.307, noise=1e-3)
    law = fit_tuning(tuned_lr(made), count=200, level=0.9, seed=0)
    assert law is not None
    exponent = law.estimate(lambda fit: fit.n_exponent)
    assert exponent.value == pytest.approx(-0.713, abs=0.03) and exponent.low <= -0.713 <= exponent.high


def test_batch_is_judged_at_its_best_learning_rate() -> None:
    """DeepSeek LLM: B = 0.2920 C^0.3271 tokens."""
    made = trials(lambda n, d: 1e-3, lambda n, d: 0.2920 * (6 * n * d) ** 0.3271, batches=(1, 4, 16, 64, 256))
    law = fit_tuning(tuned_batch(made), count=50, level=0.9, seed=0)
    assert law is not None and law.point.by_compute.exponent == pytest.approx(0.3271, rel=1e-6)


def test_optimum_at_the_edge_of_the_grid_is_not_counted() -> None:
    made = trials(lambda n, d: 1e-3 if n < 1e9 else 10.0)
    tuned = tuned_lr(made)
    assert [bool(point.valley.problem) for point in tuned] == [False] * 4 + [True] * 2
    assert fit_tuning(tuned[-3:], count=20, level=0.9, seed=0) is None


def test_transfer_is_measured_in_grid_steps() -> None:
    assert grid_steps_moved(tuned_lr(trials(lambda n, d: 1e-3))) == pytest.approx(0.0, abs=1e-6)
    shrinking = trials(lambda n, d: 1e-2 * (1e8 / n) ** 0.5, lengths=(20,))
    assert grid_steps_moved(tuned_lr(shrinking)) == pytest.approx(2.0, rel=1e-6)
