"""Progress goes through JSON unchanged."""

from __future__ import annotations

import json

from hope_megatron.training.state import TrainingState


def test_round_trip():
    state = TrainingState(step=3, samples=12, tokens=192, wall_s=1.5, newton_schulz_calls=7)
    other = TrainingState()
    other.load_dict(json.loads(json.dumps(state.to_dict())))
    assert other == state
