"""The clock of a level whose period changes: which steps update, how many updates there were, and what is refused."""

from __future__ import annotations

import pytest

from hope_megatron.config.clock import UpdateClock
from hope_megatron.config.model import CMSConfig, CMSLevelConfig, PeriodChange
from hope_megatron.testing.tiny import tiny_run_config


@pytest.mark.parametrize(
    ("clock", "updates"),
    [
        (UpdateClock(1), list(range(1, 21))),
        (UpdateClock(4), [4, 8, 12, 16, 20]),
        (UpdateClock(2, ((4, 3), (10, 1))), [2, 4, 7, *range(10, 21)]),
        (UpdateClock(1, ((3, 8),)), [1, 2, 3, 11, 19]),
        (UpdateClock(5, ((5, 10), (15, 2))), [5, 15, 17, 19]),
    ],
    ids=lambda value: value.text() if isinstance(value, UpdateClock) else "",
)
def test_updates_fall_where_they_should(clock, updates):
    assert clock.conflict() is None
    assert [step for step in range(1, 21) if clock.due(step)] == updates
    assert [clock.updates(step) for step in range(21)] == [sum(u <= step for u in updates) for step in range(21)]
    gathered = [step - max((u for u in updates if u < step), default=0) for step in updates]
    assert [clock.period(step) for step in updates] == gathered  # as many gradients as the period says


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(10, 1)], "from_step=10 falls between two updates of period 4, .*set it to 8 or 12"),
        ([(3, 1)], "set it to 4"),
        ([(8, 2), (8, 1)], "from_step=8 does not come after 8"),
        ([(8, 3), (12, 1)], "set it to 11 or 14"),
    ],
)
def test_a_change_falls_on_an_update(changes, message):
    with pytest.raises(ValueError, match=message):
        CMSLevelConfig(
            hidden_size=8,
            update_period_steps=4,
            update_period_changes=[{"from_step": step, "period": period} for step, period in changes],
        )


def test_rehearsals_weigh_the_steps_of_the_run():
    from hope_megatron.config.update_kinds import update_kinds

    slow = CMSLevelConfig(
        hidden_size=8, update_period_steps=8, update_period_changes=[PeriodChange(from_step=40, period=2)]
    )
    config = tiny_run_config(cms=CMSConfig(levels=(CMSLevelConfig(hidden_size=8), slow)), training={"steps": 100})
    assert update_kinds(config) == [(99, 0.65), (100, 0.35)]
