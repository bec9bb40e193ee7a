"""Transitions between data, skips, and the ledger."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataChangedError, DataError, SamplingError
from data_pipeline.ledger import Ledger, Skip, SkippingStream, documents_in_step
from data_pipeline.manifest import Manifest
from data_pipeline.stream import TokenStream
from data_pipeline.transition import resume


@pytest.fixture
def stream(manifest: Manifest) -> TokenStream:
    return TokenStream(manifest, 16, seed=1)


@pytest.fixture
def changed(manifest: Manifest) -> TokenStream:
    return TokenStream(replace(manifest, shards=manifest.shards[1:]), 16, seed=1)


def through_json(state: dict[str, object]) -> dict[str, object]:
    return json.loads(json.dumps(state))


def test_unchanged_data_resume_as_they_are(stream: TokenStream) -> None:
    assert resume(stream, through_json(stream.state(40))) == (stream, 40)


def test_changed_data_need_a_transition_and_start_at_their_beginning(stream: TokenStream, changed: TokenStream) -> None:
    state = through_json(stream.state(40))
    with pytest.raises(DataChangedError, match="gone"):
        resume(changed, state)
    following, number = resume(changed, state, data_transition=True)
    assert number == 40
    assert np.array_equal(following.sample(45), changed.sample(5))
    assert following.documents(45) == changed.documents(5)
    with pytest.raises(SamplingError, match="before the data transition"):
        following.sample(39)


def test_a_transition_is_remembered_by_later_positions(stream: TokenStream, changed: TokenStream) -> None:
    following, _ = resume(changed, through_json(stream.state(40)), data_transition=True)
    state = through_json(following.state(60))
    again, number = resume(changed, state)  # no permission needed: the change is on record
    assert number == 60 and again.fingerprint == following.fingerprint
    assert np.array_equal(again.sample(60), changed.sample(20))
    with pytest.raises(DataChangedError):
        resume(stream, state)
    back, number = resume(stream, state, data_transition=True)
    assert np.array_equal(back.sample(number), stream.sample(0))
    assert [entry["sample"] for entry in back.description["history"]] == [0, 40, 60]


def test_a_transition_to_another_tokenizer_is_refused(stream: TokenStream) -> None:
    foreign = TokenStream(replace(stream.manifest, tokenizer_sha256="9" * 64), 16, seed=1)
    with pytest.raises(DataChangedError, match="same tokenizer"):
        resume(foreign, stream.state(4), data_transition=True)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 15)), max_size=6), st.integers(0, 80))
def test_skips_leave_out_exactly_their_samples(manifest: Manifest, skips: list[tuple[int, int]], number: int) -> None:
    stream = TokenStream(manifest, 16, seed=1)
    left_out = {sample for first, count in skips for sample in range(first, first + count)}
    kept = [sample for sample in range(300) if sample not in left_out]
    skipping = SkippingStream(stream, [Skip(*skip) for skip in skips])
    assert skipping.source_number(number) == kept[number]
    assert np.array_equal(skipping.sample(number), stream.sample(kept[number]))


def test_positions_survive_later_skips_but_not_other_earlier_ones(stream: TokenStream) -> None:
    before = SkippingStream(stream, [])
    state = through_json(before.state(30))
    after = SkippingStream(stream, [Skip(30, 8)])
    assert after.check_state(state) == 30
    assert np.array_equal(after.sample(30), stream.sample(38))
    later = through_json(after.state(50))
    assert SkippingStream(stream, [Skip(30, 8), Skip(70, 2)]).check_state(later) == 50
    with pytest.raises(DataChangedError, match="skips before sample"):
        before.check_state(later)
    with pytest.raises(DataChangedError, match="skips before sample"):
        SkippingStream(stream, [Skip(29, 8)]).check_state(state)
    with pytest.raises(DataChangedError, match="ledger"):
        stream.check_state(later)


def test_ledger_survives_a_cut_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run" / "ledger.jsonl")
    assert ledger.entries() == []
    ledger.record_skip(30, 8, step=4, reason="loss spike")
    with open(ledger.path, "ab") as file:
        file.write(b'{"kind": "skip", "fir')
    assert ledger.skips() == [Skip(30, 8)]
    ledger.record_transition(40, "a" * 64, "b" * 64, step=5, reason="shard lost")
    assert [entry["kind"] for entry in ledger.entries()] == ["skip", "transition"]
    assert ledger.entries()[0]["reason"] == "loss spike"
    with pytest.raises(DataError, match="make sense"):
        ledger.record_skip(0, 0, step=0, reason="")
    ledger.path.write_bytes(b"nonsense\n" + ledger.path.read_bytes())
    with pytest.raises(DataError, match="damaged"):
        ledger.entries()


def test_documents_of_a_step_are_recomputed(stream: TokenStream) -> None:
    documents = documents_in_step(stream, step=3, global_batch=4)
    assert len({(entry["shard"], entry["document"]) for entry in documents}) == len(documents)
    samples = {number for entry in documents for number in entry["samples"]}
    assert samples == {12, 13, 14, 15}
    for entry in documents:
        assert entry["source"].endswith("corpus.txt") and len(entry["sha256"]) == 64
    skipping = SkippingStream(stream, [Skip(0, 4)])
    assert documents_in_step(skipping, 2, 4)[0]["sha256"] == documents[0]["sha256"]


def test_a_damaged_ledger_is_named_and_never_a_traceback(tmp_path):
    import random

    from data_pipeline.errors import DataError
    from data_pipeline.ledger import Ledger

    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record_skip(3, 4, step=7, reason="a spike")
    ledger.record_transition(9, "old", "new", step=8, reason="more code")
    good, rng = ledger.path.read_bytes(), random.Random(0)
    for _ in range(300):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        ledger.path.write_bytes(data)
        try:
            assert all({"kind"} <= entry.keys() for entry in ledger.entries())
            ledger.skips()
        except DataError as error:
            assert "ledger.jsonl is damaged" in str(error)
