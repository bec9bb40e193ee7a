from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataChangedError, SamplingError
from data_pipeline.manifest import Manifest
from data_pipeline.mixture import CYCLE, MixtureStream, round_shares
from data_pipeline.stream import TokenStream

Streams = dict[str, TokenStream]


@pytest.fixture(scope="module")
def streams(dataset: Path) -> Streams:
    train, held_out = Manifest.load(dataset / "train"), Manifest.load(dataset / "heldout")
    return {"big": TokenStream(train, 16, seed=1), "small": TokenStream(held_out, 16, seed=1)}


def test_every_sample_is_one_of_its_data_set_and_comes_in_its_order(streams: Streams) -> None:
    mixture = MixtureStream(streams, {"big": 0.7, "small": 0.3}, seed=2)
    expected: Counter[str] = Counter()
    for number in range(3 * CYCLE // 2):
        name, local = mixture.locate(number)
        assert local == expected[name]  # none left out, none twice, epoch after epoch
        expected[name] += 1
        if number % 97 == 0:
            assert np.array_equal(mixture.sample(number), streams[name].sample(local))
    assert mixture.counts(3 * CYCLE // 2) == dict(expected)
    assert mixture.locate(10**9)[1] > 10**8  # far away costs the same


def test_shares_follow_the_weights_also_over_short_stretches(streams: Streams) -> None:
    mixture = MixtureStream(streams, {"big": 3, "small": 1})
    assert mixture.counts(CYCLE) == {"big": 3072, "small": 1024}
    for start in range(0, CYCLE, 512):
        big = mixture.counts(start + 512)["big"] - mixture.counts(start)["big"]
        assert abs(big - 384) < 50  # four standard deviations


def test_schedule_changes_weights_at_its_token_and_loses_nothing(streams: Streams) -> None:
    schedule = [(0, {"big": 1.0}), (16 * 1000, {"big": 0.5, "small": 0.5}), (16 * 1777, {"small": 1.0})]
    mixture = MixtureStream(streams, schedule, seed=3)
    located = [mixture.locate(number) for number in range(3000)]
    assert {name for name, _ in located[:1000]} == {"big"}
    assert {name for name, _ in located[1777:]} == {"small"}
    half = Counter(name for name, _ in located[1000:1777])
    assert abs(half["big"] - 388) < 60
    for wanted in streams:
        assert [local for name, local in located if name == wanted] == list(range(mixture.counts(3000)[wanted]))


@settings(max_examples=30, deadline=None)
@given(
    starts=st.lists(st.integers(1, 20_000), max_size=3, unique=True).map(sorted),
    weights=st.lists(st.integers(1, 99), min_size=4, max_size=4),
    at=st.integers(0, 30_000),
)
def test_counts_are_what_was_dealt(streams: Streams, starts: list[int], weights: list[int], at: int) -> None:
    schedule = [
        (16 * start, {"big": weight, "small": 100 - weight})
        for start, weight in zip([0, *starts], weights, strict=False)
    ]
    mixture = MixtureStream(streams, schedule, seed=5)
    name, local = mixture.locate(at)
    assert mixture.counts(at)[name] == local
    after = {**mixture.counts(at), name: local + 1}
    assert mixture.counts(at + 1) == after


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40).filter(lambda shares: sum(shares) > 0.01))
def test_rounded_shares_add_up(shares: list[float]) -> None:
    exact = np.array(shares) / np.sum(shares)
    counts = round_shares(exact, CYCLE)
    assert counts.sum() == CYCLE
    assert ((counts > 0) == (exact > 0)).all()
    assert np.abs(counts - exact * CYCLE).max() <= len(shares)


def test_documents_name_their_data_set(streams: Streams) -> None:
    mixture = MixtureStream(streams, {"big": 0.5, "small": 0.5})
    for number in range(20):
        spans = mixture.documents(number)
        assert {span.dataset for span in spans} == {mixture.locate(number)[0]}
        assert mixture.provenance(spans[0])["source"].endswith("corpus.txt")


def test_changed_weights_are_shown(streams: Streams) -> None:
    state = MixtureStream(streams, {"big": 0.5, "small": 0.5}).state(10)
    with pytest.raises(DataChangedError, match="schedule"):
        MixtureStream(streams, {"big": 0.6, "small": 0.4}).check_state(state)
    other = {**streams, "small": TokenStream(streams["small"].manifest, 16, seed=9)}
    with pytest.raises(DataChangedError, match=r"datasets\.small\.seed: 1 -> 9"):
        MixtureStream(other, {"big": 0.5, "small": 0.5}).check_state(state)


def test_impossible_mixtures_are_refused(streams: Streams) -> None:
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: MixtureStream({}, {}), "at least one"),
        (lambda: MixtureStream(streams, {"bgi": 1.0}), "'bgi', which is no data set"),
        (lambda: MixtureStream(streams, {"big": 0.0}), "positive sum"),
        (lambda: MixtureStream(streams, {"big": -1.0, "small": 2}), "at least 0"),
        (lambda: MixtureStream(streams, {"big": float("nan")}), "at least 0"),
        (lambda: MixtureStream(streams, []), "empty"),
        (lambda: MixtureStream(streams, [(5, {"big": 1.0})]), "begin at token 0"),
        (lambda: MixtureStream(streams, [(0, {"big": 1.0}), (0, {"big": 1.0})]), "must rise"),
        (lambda: MixtureStream(streams, {"big": 1.0}).sample(-1), "does not exist"),
    ]
    manifest = streams["small"].manifest
    longer = {**streams, "small": TokenStream(manifest, 8)}
    foreign = {**streams, "small": TokenStream(replace(manifest, tokenizer_sha256="3" * 64), 16)}
    cases.append((lambda: MixtureStream(longer, {"big": 1.0}), "differ in seq_length"))
    cases.append((lambda: MixtureStream(foreign, {"big": 1.0}), "differ in tokenizer_sha256"))
    for make, message in cases:
        with pytest.raises(SamplingError, match=message):
            make()
