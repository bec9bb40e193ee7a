"""The replay buffer, the samples of a night, and what a teacher answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hope_megatron.config import CMSConfig, CMSLevelConfig, ParallelConfig
from hope_megatron.config.base import ConfigError
from hope_megatron.config.optim import OptimConfig
from hope_megatron.consolidation.dreaming import dream
from hope_megatron.consolidation.errors import ConsolidationError
from hope_megatron.consolidation.night import NightSource, Rows
from hope_megatron.consolidation.options import NightOptions, learning_levels, night_config, night_name
from hope_megatron.consolidation.replay import Experience, ReplayBuffer, rows_of
from hope_megatron.consolidation.store import Day, read_day, write_day
from hope_megatron.consolidation.waking import Teacher, mean_nats
from hope_megatron.model import build_model
from hope_megatron.optim import build_optimizer
from hope_megatron.optim.trainable import hold_still
from hope_megatron.parallel.distributed import init_distributed
from hope_megatron.testing.tiny import VOCAB_SIZE, tiny_run_config


def experience(surprise, length=4, draws=3):
    row = np.full(length, int(surprise * 10))
    return Experience(row, row, np.tile(row[:, None], draws).astype(np.int32), surprise)


def test_buffer_keeps_what_surprises_and_a_sample_of_the_rest():
    buffer = ReplayBuffer(8, reservoir=0.25)
    for surprise in np.random.default_rng(0).permutation(100):
        buffer.add(experience(float(surprise)))
    kept = [e.surprise for e in buffer.kept()]
    assert len(kept) == 8
    assert set(kept[:6]) == {94.0, 95.0, 96.0, 97.0, 98.0, 99.0}
    assert all(surprise < 94 for surprise in kept[6:])


def test_sample_without_surprise_is_uniform():
    counts = np.zeros(10)
    for seed in range(400):
        buffer = ReplayBuffer(2, by_surprise=False, seed=seed)
        for surprise in range(10):
            buffer.add(experience(float(surprise)))
        counts[[int(e.surprise) for e in buffer.kept()]] += 1
    assert counts.sum() == 800
    assert counts.min() > 50  # 80 expected each, a standard deviation is 8
    assert counts.max() < 110


def test_rows_of_a_stream():
    (first, _), (last, targets) = rows_of(np.arange(8), 4)
    assert first.tolist() == [0, 1, 2, 3]
    assert last.tolist() == [4, 5, 6, 0]
    assert targets.tolist() == [5, 6, 7, -100]


def night(**settings):
    rows = Rows.of([experience(1.0), experience(3.0)])
    general = Rows.of([experience(0.0)])
    return NightSource({"replay": rows, "general": general}, {"replay": 0.75, "general": 0.25}, **settings)


def test_samples_follow_shares_and_surprise():
    source = night(priority=1.0)
    first = [int(source.sample(number)[0, 0]) for number in range(2000)]
    assert np.isclose(first.count(0) / 2000, 0.25, atol=0.03)
    assert np.isclose(first.count(30) / first.count(10), 3, atol=0.6)
    assert np.array_equal(source.sample(7), night().sample(7))  # a function of its number
    alike = [int(night(priority=0.0).sample(number)[0, 0]) for number in range(2000)]
    assert np.isclose(alike.count(30) / alike.count(10), 1, atol=0.2)


def test_position_belongs_to_its_night():
    source = night()
    assert source.check_state(source.state(12)) == 12
    with pytest.raises(ConsolidationError, match="another night"):
        source.check_state(night(seed=1).state(12))


def test_day_is_read_back_or_refused(tmp_path):
    rows = {"replay": Rows.of([experience(1.0)]), "general": Rows.of([experience(0.0)])}
    origin = {"replay": 4, "general_share": 0.5, "priority": 1.0, "seed": 0}
    assert read_day(tmp_path, origin) is None
    day = Day(rows, origin, {"rows_read": 1})
    write_day(tmp_path, day)
    found = read_day(tmp_path, origin)
    assert found.source().fingerprint == day.source().fingerprint
    assert found.figures == {"rows_read": 1}
    with pytest.raises(ConsolidationError, match="replay was 4, now 5"):
        read_day(tmp_path, {**origin, "replay": 5})
    (tmp_path / "replay.safetensors").write_bytes(b"")
    with pytest.raises(ConsolidationError, match="damaged"):
        read_day(tmp_path, origin)


def levels(*inner):
    return CMSConfig(
        levels=tuple(
            CMSLevelConfig(
                hidden_size=32, update_period_steps=2**i, inner_chunk_tokens=chunk, inner_rate=0.1 if chunk else 0.0
            )
            for i, chunk in enumerate(inner)
        )
    )


def test_the_next_slower_level_learns():
    assert learning_levels(levels(None, None, None), ()) == {0: 1}  # the memories adapt
    assert learning_levels(levels(8, None, None), ()) == {1: 1}
    assert learning_levels(levels(8, 16, 32), ()) == {2: 1}
    assert learning_levels(levels(None, None, None), ("2", "3")) == {1: 1, 2: 2}
    assert learning_levels(levels(None, None, None), ("2", "3:7")) == {1: 1, 2: 7}
    with pytest.raises(ConsolidationError, match="--levels 4"):
        learning_levels(levels(None, None), ("4",))


def test_night_is_a_run_of_the_same_model():
    base = tiny_run_config()
    config = night_config(base, "later", NightOptions((), replay=6, levels=("2",)), 20)
    assert config.training.steps == 24  # 6 rows eight times, half of each batch of 4
    assert config.optim.trainable == ("layers.*.mlp.levels.1.*",)
    assert [level.update_period_steps for level in config.model.cms.levels] == [1, 1]
    assert night_name("a") == "a-night-1"
    assert night_name("a-night-9") == "a-night-10"


@pytest.fixture(scope="module")
def model():
    init_distributed(ParallelConfig())
    return build_model(tiny_run_config().model, seed=3)


def test_teacher_answers_with_the_state_it_has(model):
    rng = np.random.default_rng(0)
    pairs = rows_of(rng.integers(0, VOCAB_SIZE, 49), 16)
    teacher = Teacher(model, draws=2000, seed=0)
    *_, last = teacher.wake(pairs)
    x = torch.from_numpy(last.inputs)[None]
    with torch.no_grad():
        adapted = model(x, state=teacher.state).logits[0].softmax(-1)
        alone = model(x).logits[0].log_softmax(-1)
    shares = torch.stack([torch.bincount(torch.from_numpy(d).long(), minlength=VOCAB_SIZE) for d in last.draws]) / 2000
    assert (shares - adapted).abs().max() < 0.05
    nats = -alone.gather(1, torch.from_numpy(last.targets)[:, None]).mean().item()
    assert last.before == pytest.approx(nats, rel=1e-5)
    assert mean_nats(model, [(last.inputs, last.targets)]) == pytest.approx(nats, rel=1e-5)
    assert last.surprise > 0
    state = teacher.state
    (made,) = dream(teacher, 1, 6, begin=2)
    assert teacher.state is state
    assert made.inputs[0] == 2
    assert made.inputs[1:].tolist() == made.draws[:-1, 0].tolist()


@pytest.mark.parametrize("name", ["adamw", "m3", "muon", "adamuon", "sgd", "dgd", "delta_momentum"])
def test_what_is_held_stays(name):
    init_distributed(ParallelConfig())
    model = build_model(tiny_run_config().model, seed=3)
    hold_still(model, ("layers.*.mlp.levels.1.*",))
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(name=name, lr=1e-2))
    before = {key: value.clone() for key, value in model.named_parameters()}
    for _ in range(3):
        model(torch.ones(1, 16, dtype=torch.int64), torch.ones(1, 16, dtype=torch.int64)).losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if ".mlp.levels.1." in key}


def test_patterns_that_hold_nothing_are_refused(model):
    with pytest.raises(ConfigError, match=r"no parameter matches 'layers\.9'"):
        hold_still(model, ("layers.9",))
    with pytest.raises(ValueError, match="dmgd"):
        OptimConfig(name="dmgd", trainable=("head",))
