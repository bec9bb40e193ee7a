"""Poisoned documents and a slow rank in a real run: rolled back and skipped; named."""

from __future__ import annotations

import numpy as np
import pytest

from hope_megatron.runtime.records import append_record, read_records
from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import VOCAB_SIZE, RepeatingSource, tiny_run_config

pytestmark = [pytest.mark.distributed]

POISON = range(44 * 4, 48 * 4)
"""Samples of steps 45 to 48 (4 a step)."""


class PoisonedSource(RepeatingSource):
    """One and the same easy sample, but for a few that are noise: their loss is far above the usual."""

    def sample(self, number: int) -> np.ndarray:
        if number in POISON:
            return np.random.default_rng(number).integers(0, VOCAB_SIZE, self.seq_length + 1, dtype=np.int64)
        return np.full(self.seq_length + 1, number % 3, dtype=np.int64)


def train(rank, world_size, directory, name, action):
    from hope_megatron.config.resilience import ResilienceConfig, SpikeConfig
    from hope_megatron.testing.drill import final_state
    from hope_megatron.training.run import run_training

    rules = ResilienceConfig(spike=SpikeConfig(action=action, steps=3, deviations=6.0))
    config = tiny_run_config(output_dir=directory, training={"steps": 60}, checkpoint={"every": 10, "keep_last": 9})
    config = config.model_copy(update={"name": name, "resilience": rules})
    run = run_training(config, PoisonedSource())
    return final_state(config.run_dir), run.state.samples


@pytest.mark.timeout(300)
def test_a_spike_is_rolled_back_and_its_batches_are_skipped(tmp_path):
    """The run that goes back ends in the bits of a run whose ledger said from the start what to skip."""
    ((found, samples), _) = run_distributed(train, 2, str(tmp_path), "spiky", "act", timeout_s=200)
    entries = read_records(tmp_path / "spiky" / "ledger.jsonl").records
    (rollback,) = [entry for entry in entries if entry["event"] == "rollback"]
    assert rollback["to_step"] == 40 and set(POISON) & set(
        range(rollback["first_sample"], rollback["first_sample"] + rollback["num_samples"])
    )
    assert samples == 4 * 60 + rollback["num_samples"]

    (tmp_path / "told").mkdir()
    append_record(tmp_path / "told" / "ledger.jsonl", {key: value for key, value in rollback.items() if key != "time"})
    ((expected, _), _) = run_distributed(train, 2, str(tmp_path), "told", "act", timeout_s=200)
    assert {**found, "files": ""} == {**expected, "files": ""}

    ((warned, samples), _) = run_distributed(train, 2, str(tmp_path), "warned", "warn", timeout_s=200)
    assert samples == 4 * 60 and warned != found
    events = [entry["event"] for entry in read_records(tmp_path / "warned" / "ledger.jsonl").records]
    assert events and set(events) == {"loss spike"}


def slow_run(rank, world_size, directory):
    import time

    from hope_megatron.runtime.heartbeat import HEART
    from hope_megatron.training.run import run_training

    def drag(phase, step):
        if rank == 1 and phase == "forward" and step > 25:
            time.sleep(0.1)

    drag.engine = None
    HEART.listeners[:] = [drag]
    config = tiny_run_config(output_dir=directory, training={"steps": 75})
    run_training(config, RepeatingSource())


@pytest.mark.timeout(300)
def test_a_slow_rank_is_named(tmp_path):
    from hope_megatron.training.metrics import read_metrics

    run_distributed(slow_run, 2, str(tmp_path), timeout_s=250)
    named = {
        r["step"]: r.get("straggler/rank")
        for r in read_metrics(tmp_path / "tiny" / "metrics.jsonl")
        if "straggler/ratio" in r
    }
    assert named[75] == 1.0 and 1.0 in (named[50], named[75])
    assert "rank 1 is slow" in (tmp_path / "tiny" / "train.log").read_text()
