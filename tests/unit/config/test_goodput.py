"""The goodput model against a simulation of the same job, second by second."""

from __future__ import annotations

import random

import pytest

from hope_megatron.config.base import ConfigError
from hope_megatron.config.goodput import Faults, expected_goodput, optimal_interval_s, parse_failures


def simulate(mtbf_s: float, faults: Faults, interval_s: float, hours: float, seed: int) -> float:
    """Share of the time that trains: intervals, stalls, saves that become whole in the background, failures at any moment."""
    rng = random.Random(seed)
    clock = useful = 0.0
    next_failure = rng.expovariate(1 / mtbf_s)
    pending: list[tuple[float, float]] = []  # (whole at, useful seconds in it)
    safe = 0.0
    while clock < 3600 * hours:
        end = clock + interval_s + faults.stall_s
        if next_failure < end:
            safe = max([safe, *(work for whole_at, work in pending if whole_at <= next_failure)])
            useful, pending = safe, []
            clock = next_failure + faults.detect_s + faults.restart_s
            next_failure = clock + rng.expovariate(1 / mtbf_s)
            continue
        clock, useful = end, useful + interval_s
        pending.append((clock + faults.write_s, useful))
    return useful / clock


@pytest.mark.parametrize(
    ("mtbf_s", "interval_s"), [(44550.0, 300.0), (44550.0, 3000.0), (3600.0, 120.0), (3600.0, 900.0), (600.0, 60.0)]
)
def test_the_model_is_what_a_simulation_gives(mtbf_s: float, interval_s: float) -> None:
    faults = Faults()
    expected = expected_goodput(mtbf_s, faults, interval_s)
    hours = 2000 * mtbf_s / 3600
    found = simulate(mtbf_s, faults, interval_s, hours, seed=1)
    assert found == pytest.approx(expected.productive, abs=max(0.002, 0.02 * (1 - expected.productive)))


def test_shares_are_all_of_the_time() -> None:
    found = expected_goodput(7200.0, Faults())
    assert found.productive + found.saves + found.redone + found.detection + found.restarts == pytest.approx(1.0)
    assert min(found.saves, found.redone, found.detection, found.restarts) > 0


def test_no_interval_is_better_than_the_best() -> None:
    faults = Faults(stall_s=5.0)
    best = optimal_interval_s(20_000.0, 5.0)
    goodput = expected_goodput(20_000.0, faults).productive
    for factor in (0.3, 0.7, 0.9, 1.1, 1.5, 3.0):
        assert expected_goodput(20_000.0, faults, factor * best).productive <= goodput + 1e-5


def test_512_nodes_at_the_failure_rate_of_llama_3_train_99_percent_of_the_time() -> None:
    mtbf_s = parse_failures("1/264d-per-node", 512)
    assert mtbf_s == pytest.approx(264 * 86400 / 512)
    assert expected_goodput(mtbf_s, Faults()).productive >= 0.99


@pytest.mark.parametrize(
    "text", ["", "1/264", "264d-per-node", "1/0d-per-node", "0/1d-per-node", "1/2d-per-rack", "x/1d-per-job"]
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="1/264d-per-node"):
        parse_failures(text, 8)


def test_forms() -> None:
    assert parse_failures("2/d-per-job", 512) == 43200
    assert parse_failures("1/8h-per-job", 3) == 28800
