from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.corpus import ReadOptions
from data_pipeline.errors import EmptySplitError, OutputError, ShardError
from data_pipeline.manifest import Manifest
from data_pipeline.merge import merge
from data_pipeline.prepare import prepare, slice_name
from data_pipeline.shards import ShardReader
from data_pipeline.tokenizer import Tokenizer

OPTIONS: dict[str, Any] = {"held_out_fraction": 0.2, "shard_tokens": 800, "read": ReadOptions(text_unit="line")}


def texts_of(directory: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    manifest = Manifest.load(directory / split)
    readers = [ShardReader(manifest.path(info.name), info, manifest.token_dtype) for info in manifest.shards]
    return [tokenizer.decode(tokens) for reader in readers for tokens, _ in reader.documents()]


@pytest.fixture
def corpus(write_corpus: Callable[..., Path], make_texts: Callable[..., list[str]]) -> Path:
    texts = make_texts(90)
    return write_corpus([*texts, *texts[5:25], "", *make_texts(9, seed=4)], per_file=15)


def prepare_slices(corpus: Path, tokenizer: Tokenizer, out: Path, count: int) -> None:
    for index in reversed(range(count)):
        prepare([corpus], tokenizer, out, slice=(index, count), **OPTIONS)


@pytest.mark.parametrize("count", [2, 3, 11])  # the last leaves slices without a file
def test_merged_slices_hold_what_one_run_holds(tmp_path: Path, corpus: Path, tokenizer: Tokenizer, count: int) -> None:
    whole = prepare([corpus], tokenizer, tmp_path / "whole", **OPTIONS)
    prepare_slices(corpus, tokenizer, tmp_path / "out", count)
    report = merge(tmp_path / "out")
    assert report.documents == whole.documents and report.tokens == whole.tokens
    assert report.rejected == whole.rejected == {"duplicate": 20, "empty": 1}
    assert report.documents_in == whole.documents_in == report.documents_out + report.documents_rejected
    assert report.text_bytes == whole.text_bytes
    for split in ("train", "heldout"):
        merged = texts_of(tmp_path / "out", split, tokenizer)
        assert sorted(merged) == sorted(texts_of(tmp_path / "whole", split, tokenizer))
        assert len(merged) == len(set(merged))


def test_merging_again_gives_the_same_bytes(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    prepare_slices(corpus, tokenizer, tmp_path / "out", 3)

    def digests() -> dict[str, str]:
        files = [p for split in ("train", "heldout") for p in sorted((tmp_path / "out" / split).iterdir())]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    first = merge(tmp_path / "out")
    before = digests()
    assert merge(tmp_path / "out") == first
    assert merge(tmp_path / "out", overwrite=True) == first
    assert digests() == before


def test_a_killed_merge_is_done_again(tmp_path: Path, corpus: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    prepare_slices(corpus, tokenizer, tmp_path / "one", 3)
    prepare_slices(corpus, tokenizer, tmp_path / "two", 3)
    first = merge(tmp_path / "one")
    monkeypatch.setattr("data_pipeline.merge.save_split", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge(tmp_path / "two")
    monkeypatch.undo()
    again = merge(tmp_path / "two")
    assert replace(again, manifests=first.manifests) == first
    shards = [sorted(path.read_bytes() for path in (tmp_path / d / "train").iterdir()) for d in ("one", "two")]
    assert shards[0] == shards[1]


@pytest.mark.parametrize("name", ["train/shard-000099.tar", "heldout/manifest.json", ".progress.json"])
def test_what_no_merge_wrote_is_not_replaced(tmp_path: Path, corpus: Path, tokenizer: Tokenizer, name: str) -> None:
    out = tmp_path / "out"
    prepare_slices(corpus, tokenizer, out, 2)
    foreign = out / name
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_bytes(b"somebody's work")
    with pytest.raises(OutputError, match=r"another origin|not finished"):
        merge(out)
    assert foreign.read_bytes() == b"somebody's work"
    merge(out, overwrite=True)
    assert not foreign.exists() or foreign.read_bytes() != b"somebody's work"


def test_incomplete_or_mixed_slices_are_refused(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="does not exist"):
        merge(out)
    prepare([corpus], tokenizer, out, slice=(0, 3), **OPTIONS)
    with pytest.raises(OutputError, match="2 of 3 slices are not finished: 1, 2"):
        merge(out)
    prepare([corpus], tokenizer, out, slice=(1, 3), **OPTIONS)
    prepare([corpus], tokenizer, out, slice=(2, 3), **{**OPTIONS, "held_out_fraction": 0.3})
    with pytest.raises(OutputError, match="slice 2 was made with"):
        merge(out)
    prepare([corpus], tokenizer, out, slice=(0, 2), **OPTIONS)
    with pytest.raises(OutputError, match="different divisions"):
        merge(out)


def test_damaged_slices_are_refused(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    prepare_slices(corpus, tokenizer, tmp_path / "out", 2)
    path = tmp_path / "out" / slice_name(1, 2) / "train" / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="has changed"):
        merge(tmp_path / "out")
    assert not (tmp_path / "out" / "prepare.json").exists()


def test_a_split_without_documents_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"the only text of {name}")
    for index in range(2):
        prepare([f"{tmp_path}/*.txt"], tokenizer, tmp_path / "out", slice=(index, 2), held_out_fraction=1e-9)
    with pytest.raises(EmptySplitError, match="heldout"):
        merge(tmp_path / "out")
