"""Transitions between data, the ledger, and what a run has read."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataChangedError, DataError, SamplingError
from data_pipeline.history import DataHistory, Stretch, open_recipe
from data_pipeline.ledger import Ledger
from data_pipeline.manifest import Manifest
from data_pipeline.mixture import MixtureStream
from data_pipeline.samples import SampleStream
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


def test_ledger_survives_a_cut_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run" / "ledger.jsonl")
    assert ledger.entries() == []
    ledger.record_corrupt("shard-000001.tar", "data/train", "c" * 64, reason="a bit")
    with open(ledger.path, "ab") as file:
        file.write(b'{"kind": "corrupt", "sha')
    ledger.record_transition(40, "a" * 64, "b" * 64, step=5, reason="shard lost")
    ledger.record_transition(40, "a" * 64, "b" * 64, step=5, reason="another rank")
    assert [entry["kind"] for entry in ledger.entries()] == ["corrupt", "transition"]
    assert ledger.entries()[1]["reason"] == "shard lost"
    ledger.path.write_bytes(b"nonsense\n" + ledger.path.read_bytes())
    with pytest.raises(DataError, match="damaged"):
        ledger.entries()


def test_a_damaged_ledger_is_named_and_never_a_traceback(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record_corrupt("shard-000001.tar", "data/train", "c" * 64, reason="a bit")
    ledger.record_transition(9, "old", "new", step=8, reason="more code")
    good, generator = ledger.path.read_bytes(), random.Random(0)
    for _ in range(300):
        data = bytearray(good)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        ledger.path.write_bytes(data)
        try:
            assert all({"kind"} <= entry.keys() for entry in ledger.entries())
        except DataError as error:
            assert "ledger.jsonl is damaged" in str(error)


# ---- what a run has read -------------------------------------------------------------------------------------------


def test_documents_of_samples_are_computed_again(stream: TokenStream) -> None:
    documents = DataHistory([Stretch(0, stream)]).documents(range(12, 16))
    assert len({(entry["shard"], entry["document"]) for entry in documents}) == len(documents)
    assert {number for entry in documents for number in entry["samples"]} == {12, 13, 14, 15}
    for entry in documents:
        assert entry["source"].endswith("corpus.txt") and len(entry["sha256"]) == 64


@pytest.mark.parametrize("mixed", [False, True])
def test_data_before_a_transition_are_opened_again(
    stream: TokenStream, changed: TokenStream, tmp_path: Path, mixed: bool
) -> None:
    manifest = stream.manifest
    old: SampleStream = stream
    if mixed:
        schedule = [(0, {"a": 0.7, "b": 0.3}), (480, {"a": 1.0})]
        old = MixtureStream({"a": stream, "b": TokenStream(manifest, 16, seed=2, shuffle_shards=3)}, schedule, seed=4)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    new, number = resume(changed, through_json(old.state(40)), data_transition=True)
    ledger.record_transition(
        number, old.fingerprint, new.fingerprint, step=10, reason="", old_recipe=through_json(old.state(40))["recipe"]
    )
    history = DataHistory.of_run(changed, ledger)
    for sample in (0, 17, 39, 40, 55):
        found, local = history.locate(sample)
        expected = old.sample(sample) if sample < 40 else changed.sample(sample - 40)
        assert np.array_equal(found.sample(local), expected)
        assert history.documents([sample])[0]["samples"] == [sample]


def test_data_that_have_changed_since_are_refused(stream: TokenStream) -> None:
    recipe = {**stream.recipe, "seed": 9}
    with pytest.raises(DataChangedError, match="changed since"):
        open_recipe(recipe)
    with pytest.raises(DataChangedError, match="does not say where they lie"):
        DataHistory([Stretch(0), Stretch(4, stream)]).locate(0)
    with pytest.raises(SamplingError, match="does not exist"):
        DataHistory([Stretch(0, stream)]).locate(-1)
