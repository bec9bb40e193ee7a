from __future__ import annotations

import itertools
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import CorruptShardError, DataChangedError, SamplingError, ShardError, TokenRangeError
from data_pipeline.files import sha256_file
from data_pipeline.ledger import Ledger
from data_pipeline.manifest import Manifest, ShardInfo
from data_pipeline.mixture import MixtureStream
from data_pipeline.samples import NO_TOKEN
from data_pipeline.shards import ShardReader, ShardWriter
from data_pipeline.stream import TokenStream
from data_pipeline.transition import TransitionedStream


def packed(manifest: Manifest, order: list[int] | None = None) -> np.ndarray:
    """The slow reference: all documents of the shards in the given order, an end mark after each."""
    pieces = []
    for number in order if order is not None else range(len(manifest.shards)):
        info = manifest.shards[number]
        reader = ShardReader(manifest.path(info.name), info, manifest.token_dtype)
        for tokens, _ in reader.documents():
            pieces += [tokens.astype(np.int64), np.array([manifest.eos_id])]
    return np.concatenate(pieces)


def numbered_manifest(directory: Path, lengths: list[list[int]]) -> Manifest:
    """Shards whose packed tokens are 1, 2, 3, ...: every token names its place. End marks are 0."""
    writer = ShardWriter(directory, np.dtype("<u4"), shard_tokens=10**9)
    token = itertools.count(1)
    for shard in lengths:
        for length in shard:
            writer.add(np.fromiter((next(token) for _ in range(length)), dtype="<u4", count=length), {})
        writer.seal()
    special = {"unk": -1, "bos": -1, "eos": 0, "pad": -1}
    return Manifest("train", writer.finish(), "0" * 64, 1 << 20, special, "<u4", str(directory))


@pytest.mark.parametrize("seq_length", [1, 7, 64, 1000])
def test_samples_are_windows_of_the_packed_documents(manifest: Manifest, seq_length: int) -> None:
    stream = TokenStream(manifest, seq_length, seed=3, shuffle_shards=2)
    for epoch in (0, 1):
        tokens = packed(manifest, stream._epoch(epoch).shards)
        windows = Counter(tokens[i * seq_length :][: seq_length + 1].tobytes() for i in range(stream.num_samples))
        samples = Counter(stream.sample(epoch * stream.num_samples + i).tobytes() for i in range(stream.num_samples))
        assert samples == windows
    assert stream.sample(0).dtype == np.int64


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6), min_size=1, max_size=6),
    seq_length=st.integers(1, 20),
    seed=st.integers(0, 3),
    shuffle_shards=st.integers(1, 4),
)
def test_every_sample_comes_exactly_once_per_epoch(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[list[int]],
    seq_length: int,
    seed: int,
    shuffle_shards: int,
) -> None:
    manifest = numbered_manifest(tmp_path_factory.mktemp("numbered"), lengths)
    if sum(map(sum, lengths)) + sum(map(len, lengths)) <= seq_length:
        with pytest.raises(SamplingError, match="needs"):
            TokenStream(manifest, seq_length)
        return
    stream = TokenStream(manifest, seq_length, seed, shuffle_shards=shuffle_shards)
    for epoch in range(3):
        samples = [stream.sample(epoch * stream.num_samples + i) for i in range(stream.num_samples)]
        seen = Counter(token for sample in samples for token in sample[:-1].tolist() if token)
        assert set(seen.values()) <= {1}  # nothing twice
        unseen = sum(map(sum, lengths)) - len(seen)
        assert unseen <= seq_length + 1  # and nothing left out but the rest that fills no window


def test_resume_sees_every_sample_once(manifest: Manifest) -> None:
    whole = TokenStream(manifest, 16, seed=5)
    seen: list[np.ndarray] = []
    state = whole.state(0)
    for count in (36, 48, 24, 60):
        stream = TokenStream(manifest, 16, seed=5)
        position = stream.check_state(state)
        seen += [stream.sample(number) for number in range(position, position + count)]
        state = stream.state(position + count)
    assert len(seen) == state["sample"] == 168
    assert all(np.array_equal(row, whole.sample(number)) for number, row in enumerate(seen))


def test_seed_and_epoch_change_the_order(manifest: Manifest) -> None:
    def order(seed: int, epoch: int) -> bytes:
        stream = TokenStream(manifest, 16, seed=seed)
        return b"".join(stream.sample(epoch * stream.num_samples + i).tobytes() for i in range(20))

    assert len({order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert order(0, 1) == order(0, 1)
    plain = TokenStream(manifest, 16, shuffle=False)
    assert np.array_equal(np.concatenate([plain.sample(i)[:-1] for i in range(20)]), packed(manifest)[:320])


def test_part_of_a_sample_is_read_alone(tmp_path: Path) -> None:
    """Also through a mixture and after a transition; shards that hold none of it stay closed."""
    manifest = numbered_manifest(tmp_path, [[30], [10, 30], [40]])
    stream = TokenStream(manifest, 50, shuffle=False)
    history = [{"sample": 0, "fingerprint": "x"}, {"sample": 5, "fingerprint": "y"}]
    following = TransitionedStream(MixtureStream({"one": stream}, {"one": 1.0}), history)
    for first, stop in ((0, 51), (0, 26), (25, 51), (49, 50)):
        assert np.array_equal(following.sample(6, first, stop), following.sample(6)[first:stop])
    part = TokenStream(manifest, 50, shuffle=False)
    assert part.sample(1, 30, 51).tolist() == packed(manifest)[80:101].tolist()
    assert list(part._shards._readers) == [2]
    with pytest.raises(SamplingError, match="tokens 3 to 3 of a sample of 51"):
        stream.sample(0, 3, 3)


def test_windows_give_every_token_once_in_order(dataset: Path) -> None:
    manifest = Manifest.load(dataset / "heldout")
    reference = packed(manifest)
    for seq_length in (1, 10, 33, len(reference) - 1):
        stream = TokenStream(manifest, seq_length)
        windows = list(stream.windows())
        assert len(windows) == stream.num_windows
        assert np.array_equal(np.concatenate([w[1:] for w in windows]), reference[1:])
        assert np.array_equal(np.concatenate([w[:-1] for w in windows]), reference[:-1])


def test_document_spans_cover_the_sample(manifest: Manifest) -> None:
    stream = TokenStream(manifest, 50, seed=2, shuffle_shards=1)
    readers = {info.name: ShardReader(manifest.path(info.name), info, manifest.token_dtype) for info in manifest.shards}
    for number in range(stream.num_samples):
        tokens, spans = stream.sample(number), stream.documents(number)
        assert spans[0].start == 0 and spans[-1].stop == 51
        assert all(a.stop == b.start and b.offset == 0 for a, b in itertools.pairwise(spans))
        for span in spans:
            document = np.append(readers[span.shard].document(span.document), manifest.eos_id)
            assert np.array_equal(tokens[span.start : span.stop], document[span.offset :][: span.stop - span.start])
        assert np.flatnonzero(tokens[:-1] == manifest.eos_id).tolist() == [span.stop - 1 for span in spans[:-1]]


def test_provenance_leads_back_to_the_source(manifest: Manifest) -> None:
    stream = TokenStream(manifest, 50)
    where = stream.provenance(stream.documents(3)[0])
    assert where["source"].endswith("corpus.txt") and where["position"] >= 0


def test_other_data_are_refused_with_the_difference(manifest: Manifest) -> None:
    stream = TokenStream(manifest, 16, seed=1)
    state = stream.state(7)
    assert stream.check_state(state) == 7
    first = manifest.shards[0]
    changes = {
        "seed: 1 -> 2": TokenStream(manifest, 16, seed=2),
        "seq_length: 16 -> 8": TokenStream(manifest, 8, seed=1),
        "shuffle_shards": TokenStream(manifest, 16, seed=1, shuffle_shards=3),
        "tokenizer": TokenStream(replace(manifest, tokenizer_sha256="1" * 64), 16, seed=1),
        f"shards.{first.name}: gone": TokenStream(replace(manifest, shards=manifest.shards[1:]), 16, seed=1),
        f"shards.{first.name}: {first.sha256[:16]}": TokenStream(
            replace(manifest, shards=(replace(first, sha256="2" * 64), *manifest.shards[1:])), 16, seed=1
        ),
        "shards.renamed.tar: new": TokenStream(
            replace(manifest, shards=(replace(first, name="renamed.tar"), *manifest.shards[1:])), 16, seed=1
        ),
        "manifest": TokenStream(replace(manifest, shards=manifest.shards[::-1]), 16, seed=1),
    }
    for difference, changed in changes.items():
        with pytest.raises(DataChangedError) as error:
            changed.check_state(state)
        assert difference in str(error.value) and "--data-transition" in str(error.value)
    with pytest.raises(DataChangedError, match="no field"):
        stream.check_state({})


def test_samples_begin_at_zero(manifest: Manifest) -> None:
    with pytest.raises(SamplingError, match="does not exist"):
        TokenStream(manifest, 16).sample(-1)


@pytest.fixture
def copied(tmp_path: Path, manifest: Manifest) -> tuple[Manifest, ShardInfo, Path]:
    shutil.copytree(manifest.location, tmp_path / "train")
    info = manifest.shards[0]
    return replace(manifest, location=str(tmp_path / "train")), info, tmp_path / "train" / info.name


def read_everything(manifest: Manifest) -> None:
    stream = TokenStream(manifest, 16)
    for number in range(stream.num_samples):
        stream.sample(number)


@pytest.mark.parametrize("damage", ["flip", "truncate", "swap", "delete", "flip_index", "truncate_index", "no_index"])
def test_damaged_shards_are_caught_and_named(copied: tuple[Manifest, ShardInfo, Path], damage: str) -> None:
    manifest, info, path = copied
    target = path.with_suffix(".idx") if "index" in damage else path
    if damage.startswith("flip"):
        data = bytearray(target.read_bytes())
        data[len(data) // 2] ^= 1
        target.write_bytes(data)
    elif damage.startswith("truncate"):
        target.write_bytes(target.read_bytes()[:-16])
    elif damage == "swap":
        target.write_bytes(path.with_name(manifest.shards[1].name).read_bytes())
    else:
        target.unlink()
    with pytest.raises(ShardError, match=info.name):
        read_everything(manifest)


@pytest.mark.parametrize("damage", ["flip", "truncate", "flip_index"])
def test_a_corrupt_shard_is_left_out_on_request_and_recorded_once(
    copied: tuple[Manifest, ShardInfo, Path], damage: str
) -> None:
    manifest, info, path = copied
    whole = TokenStream(manifest, 16, seed=2)
    expected = [(whole.sample(n), whole.documents(n)) for n in range(whole.num_samples)]
    target = path.with_suffix(".idx") if "index" in damage else path
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data[:-16] if damage == "truncate" else data)
    ledger = Ledger(path.parent.parent / "ledger.jsonl")
    for _ in range(2):  # two processes of a run
        stream = TokenStream(manifest, 16, seed=2, skip_corrupt=ledger)
        for number, (sample, spans) in enumerate(expected):
            lost = np.repeat([span.shard == info.name for span in spans], [span.stop - span.start for span in spans])
            assert np.array_equal(stream.sample(number), np.where(lost, NO_TOKEN, sample))
            left = [span for span in stream.documents(number) if span.document < 0]
            assert sum(span.stop - span.start for span in left) == lost.sum() and {span.shard for span in left} <= {
                info.name
            }
            assert all(stream.provenance(span)["source"].startswith("left out") for span in left)
    assert stream.fingerprint == whole.fingerprint
    (entry,) = ledger.entries()
    assert (entry["kind"], entry["shard"], entry["sha256"]) == ("corrupt", info.name, info.sha256)


def test_the_digests_of_a_changed_shard_are_named(copied: tuple[Manifest, ShardInfo, Path]) -> None:
    manifest, info, path = copied
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(
        CorruptShardError, match=f"{info.name} has changed: its SHA-256 is {sha256_file(path)}, .*{info.sha256}"
    ):
        read_everything(manifest)


@pytest.mark.parametrize("suffix", [".tar", ".idx"])
def test_a_missing_shard_is_never_left_out(copied: tuple[Manifest, ShardInfo, Path], suffix: str) -> None:
    manifest, info, path = copied
    path.with_suffix(suffix).unlink()
    stream = TokenStream(manifest, 16, skip_corrupt=Ledger(path.parent.parent / "ledger.jsonl"))
    with pytest.raises(ShardError, match=info.name):
        for number in range(stream.num_samples):
            stream.sample(number)


def test_ids_outside_the_vocabulary_are_refused(manifest: Manifest) -> None:
    with pytest.raises(TokenRangeError, match=r"shard-\d+\.tar is outside the vocabulary of 300"):
        read_everything(replace(manifest, vocab_size=300))
