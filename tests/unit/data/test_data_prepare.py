from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from data_pipeline.corpus import ReadOptions
from data_pipeline.errors import EmptySplitError, OutputError, ShardError, SourceError
from data_pipeline.filters import Filters
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import PrepareReport, in_held_out, prepare
from data_pipeline.shards import ShardReader
from data_pipeline.tokenizer import Tokenizer

Texts = Callable[..., list[str]]
LINES = ReadOptions(text_unit="line")


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a result, by its path."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def read_back(directory: Path, tokenizer: Tokenizer) -> list[tuple[str, dict[str, Any]]]:
    """Text and provenance of every document of both splits, in the order of the source."""
    documents = []
    for split in ("train", "heldout"):
        manifest = Manifest.load(directory / split)
        for info in manifest.shards:
            reader = ShardReader(manifest.path(info.name), info, manifest.token_dtype)
            documents += [(tokenizer.decode(tokens), where) for tokens, where in reader.documents()]
    return sorted(documents, key=lambda entry: (entry[1]["source"], entry[1]["position"]))


def test_every_text_comes_back_and_every_document_is_counted(
    tmp_path: Path, write_corpus: Callable[..., Path], tokenizer: Tokenizer, make_texts: Texts
) -> None:
    texts = [text.replace("\n", " ") for text in make_texts(100)]
    corpus = write_corpus([*texts, "", "   ", texts[3], "nul \0 byte"])
    report = prepare([corpus], tokenizer, tmp_path / "out", held_out_fraction=0.2, shard_tokens=500, read=LINES)
    assert report.documents_in == 104 == report.documents_out + report.documents_rejected
    assert report.rejected == {"duplicate": 1, "empty": 2, "nul_byte": 1}
    documents = read_back(tmp_path / "out", tokenizer)
    assert [text for text, _ in documents] == texts
    for text, where in documents:
        assert where["sha256"] == hashlib.sha256(text.encode()).hexdigest()
        assert where["bytes"] == len(text.encode())
    assert 5 < report.documents["heldout"] < 40
    assert report.text_bytes == sum(len(text.encode()) for text in texts)


def test_manifest_counts_are_those_of_the_shards(dataset: Path, tokenizer: Tokenizer) -> None:
    for split in ("train", "heldout"):
        manifest = Manifest.load(dataset / split)
        assert manifest.tokenizer_sha256 == tokenizer.digest and manifest.vocab_size == tokenizer.vocab_size
        for info in manifest.shards:
            path = Path(manifest.path(info.name))
            assert info.bytes == path.stat().st_size
            assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
            with tarfile.open(path) as tar:
                names = tar.getnames()
            assert len(names) == 2 * info.documents
            assert all(name.endswith((".u16", ".json")) for name in names)
        assert len(manifest.shards) >= 3 if split == "train" else 1
        assert all(info.tokens <= 1000 for info in manifest.shards)


def test_plain_webdataset_reads_the_shards(dataset: Path, tokenizer: Tokenizer) -> None:
    manifest = Manifest.load(dataset / "train")
    urls = [manifest.path(info.name) for info in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == manifest.documents
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    ours = [
        pair
        for info in manifest.shards
        for pair in ShardReader(manifest.path(info.name), info, manifest.token_dtype).documents()
    ]
    for sample, (tokens, where) in zip(samples, ours, strict=True):
        assert np.array_equal(np.frombuffer(sample["u16"], dtype="<u2"), tokens)
        assert sample["json"] == where


def test_wids_index_lists_every_shard(dataset: Path) -> None:
    manifest = Manifest.load(dataset / "train")
    index = json.loads((dataset / "train" / "wids.json").read_text())
    assert index["__kind__"] == "wids-shard-index-v1" and index["wids_version"] == 1
    assert [(s["url"], s["nsamples"]) for s in index["shardlist"]] == [(s.name, s.documents) for s in manifest.shards]


def test_held_out_split_depends_on_the_text_alone(
    tmp_path: Path, write_corpus: Callable[..., Path], tokenizer: Tokenizer, make_texts: Texts
) -> None:
    texts = make_texts(80)
    held_out = []
    for name, some in (("a", texts), ("b", texts[::-1]), ("c", texts + make_texts(40, seed=9))):
        corpus = write_corpus(some, name)
        prepare([corpus], tokenizer, tmp_path / f"out-{name}", held_out_fraction=0.2, read=LINES)
        where = [w for _, w in read_back(tmp_path / f"out-{name}", tokenizer)]
        held_out.append({w["sha256"] for w in where if in_held_out(bytes.fromhex(w["sha256"]), 0.2)})
    assert held_out[0] == held_out[1] < held_out[2]


def test_number_of_workers_does_not_change_a_byte(
    tmp_path: Path, write_corpus: Callable[..., Path], tokenizer: Tokenizer, make_texts: Texts
) -> None:
    corpus = write_corpus(make_texts(700), per_file=400)
    for workers in (1, 2):
        prepare(
            [corpus], tokenizer, tmp_path / str(workers), held_out_fraction=0.1, shard_tokens=5000, workers=workers,
            read=LINES, near_duplicates=0.9,
        )  # fmt: skip
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 4])
@pytest.mark.parametrize("commit_every", [0.0, 1e9])
def test_interrupted_run_continues_with_the_same_bytes(
    tmp_path: Path,
    write_corpus: Callable[..., Path],
    tokenizer: Tokenizer,
    make_texts: Texts,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: int,
    commit_every: float,
) -> None:
    corpus = write_corpus([*make_texts(40), *make_texts(10), ""], per_file=20)
    options: dict[str, Any] = {"held_out_fraction": 0.1, "shard_tokens": 1000, "read": LINES, "near_duplicates": 0.95}
    undisturbed = prepare([corpus], tokenizer, tmp_path / "whole", **options)
    from data_pipeline.shards import ShardWriter

    calls = 0
    original = ShardWriter.add

    def failing(self: ShardWriter, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % (stop_after * 7) == 0:
            raise Interrupted
        original(self, *arguments)

    monkeypatch.setattr(ShardWriter, "add", failing)
    report: PrepareReport | None = None
    for attempt in range(100):
        if commit_every and attempt == 2:  # without commits no attempt gets further: let the last one through
            monkeypatch.setattr(ShardWriter, "add", original)
        try:
            report = prepare([corpus], tokenizer, tmp_path / "cut", commit_seconds=commit_every, **options)
            break
        except Interrupted:
            assert not (tmp_path / "cut" / "train" / "manifest.json").exists()
    assert report is not None and calls > stop_after * 7
    assert digests(tmp_path / "whole") == digests(tmp_path / "cut")
    assert report.rejected == undisturbed.rejected and report.documents_in == undisturbed.documents_in


def test_killed_process_continues_with_the_same_bytes(
    tmp_path: Path, write_corpus: Callable[..., Path], tokenizer_path: Path, tokenizer: Tokenizer, make_texts: Texts
) -> None:
    corpus = write_corpus(make_texts(1500, max_words=200), per_file=500)
    options: dict[str, Any] = {"held_out_fraction": 0.1, "shard_tokens": 10_000, "read": LINES}
    prepare([corpus], tokenizer, tmp_path / "whole", **options)
    script = (
        "import sys; from data_pipeline.prepare import prepare; from data_pipeline.corpus import ReadOptions\n"
        f"prepare([{str(corpus)!r}], {str(tokenizer_path)!r}, {str(tmp_path / 'cut')!r}, held_out_fraction=0.1,"
        "shard_tokens=10_000, workers=1, read=ReadOptions(text_unit='line'), commit_seconds=0.1)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.getcwd()})
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cut").glob("train/shard-000001.tar")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "prepare.json").exists()
    prepare([corpus], tokenizer, tmp_path / "cut", **options)
    assert digests(tmp_path / "whole") == digests(tmp_path / "cut")


def test_second_call_returns_the_first_result(
    tmp_path: Path, write_corpus: Callable[..., Path], tokenizer: Tokenizer, make_texts: Texts
) -> None:
    corpus = write_corpus(make_texts(40))
    first = prepare([corpus], tokenizer, tmp_path / "out", held_out_fraction=0.2, read=LINES)
    before = digests(tmp_path / "out")
    again = prepare([corpus], tokenizer, tmp_path / "out", held_out_fraction=0.2, read=LINES)
    assert again.documents == first.documents and again.manifests == first.manifests
    assert digests(tmp_path / "out") == before
    (tmp_path / "out" / "train" / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(ShardError, match="missing or damaged"):
        prepare([corpus], tokenizer, tmp_path / "out", held_out_fraction=0.2, read=LINES)
    prepare([corpus], tokenizer, tmp_path / "out", held_out_fraction=0.2, read=LINES, overwrite=True)
    assert digests(tmp_path / "out") == before


def test_other_settings_in_the_same_directory_are_refused(
    tmp_path: Path, write_corpus: Callable[..., Path], tokenizer: Tokenizer, make_texts: Texts
) -> None:
    corpus = write_corpus(make_texts(40))
    prepare([corpus], tokenizer, tmp_path / "out", held_out_fraction=0.2, read=LINES)
    with pytest.raises(OutputError, match="other settings"):
        prepare([corpus], tokenizer, tmp_path / "out", held_out_fraction=0.3, read=LINES)
    with (corpus / "part-000000.txt").open("a") as file:
        file.write("one more line\n")
    with pytest.raises(OutputError, match="other sources"):
        prepare([corpus], tokenizer, tmp_path / "out", held_out_fraction=0.2, read=LINES)
    report = prepare([corpus], tokenizer, tmp_path / "out", held_out_fraction=0.2, read=LINES, overwrite=True)
    assert report.documents_in == 41


def test_files_of_others_are_neither_used_nor_removed(
    tmp_path: Path, write_corpus: Callable[..., Path], tokenizer: Tokenizer, make_texts: Texts
) -> None:
    corpus = write_corpus(make_texts(40))
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "train" / "photos.tar").write_text("mine")
    foreign = tmp_path / "out" / "train" / "shard-000000.tar"
    foreign.write_text("from elsewhere")
    with pytest.raises(OutputError, match="another origin"):
        prepare([corpus], tokenizer, tmp_path / "out", held_out_fraction=0.2, read=LINES)
    assert foreign.read_text() == "from elsewhere"
    with pytest.raises(EmptySplitError):
        prepare([corpus], tokenizer, tmp_path / "out", filters=Filters(min_chars=10**6), overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out" / "train").iterdir()) == ["notes.txt", "photos.tar"]


def test_two_writers_of_one_directory_are_refused(
    tmp_path: Path, write_corpus: Callable[..., Path], tokenizer: Tokenizer, make_texts: Texts
) -> None:
    corpus = write_corpus(make_texts(40))

    def second(report: PrepareReport, part: float | None) -> None:
        with pytest.raises(OutputError, match="another process"):
            prepare([corpus], tokenizer, tmp_path / "out", read=LINES)

    prepare([corpus], tokenizer, tmp_path / "out", held_out_fraction=0.2, read=LINES, progress=second)


def test_empty_splits_are_refused_and_leave_nothing(
    tmp_path: Path, write_corpus: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    (tmp_path / "one.txt").write_text("a single document\n")
    with pytest.raises(EmptySplitError, match="--text-unit chunk"):
        prepare([tmp_path / "one.txt"], tokenizer, tmp_path / "out", held_out_fraction=0.01)
    report = prepare([tmp_path / "one.txt"], tokenizer, tmp_path / "out", held_out_fraction=0.0)
    assert report.documents == {"train": 1}
    with pytest.raises(EmptySplitError, match=r"none of the 2 documents was kept \(rejected: too_short 2\)"):
        prepare([write_corpus(["a", "b"])], tokenizer, tmp_path / "x", read=LINES, filters=Filters(min_chars=5))
    assert not (tmp_path / "x" / "train").exists()


def test_filters_count_by_reason(tmp_path: Path, write_corpus: Callable[..., Path], tokenizer: Tokenizer) -> None:
    (tmp_path / "in").mkdir()
    texts = {"a": "fine text of letters", "b": "x", "c": "=-=-=-=-=-=-=-", "d": "same line\n" * 9, "e": "y" * 999}
    for name, text in texts.items():
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    report = prepare(
        [tmp_path / "in"], tokenizer, tmp_path / "out", held_out_fraction=0.0,
        filters=Filters(min_chars=2, max_chars=500, max_repeated_lines=0.3, min_letters=0.5),
    )  # fmt: skip
    assert report.rejected == {"few_letters": 1, "repeated_lines": 1, "too_long": 1, "too_short": 1}
    assert report.documents == {"train": 1}


def test_unwritable_and_impossible_outputs_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "in.txt").write_text("text")
    with pytest.raises(OutputError, match="collide"):
        prepare([tmp_path / "in.txt"], tokenizer, tmp_path / "file" / "out")
    for options in ({"held_out_fraction": 1.0}, {"shard_tokens": 0}, {"near_duplicates": 2.0}, {"slice": (3, 3)}):
        with pytest.raises(OutputError):
            prepare([tmp_path / "in.txt"], tokenizer, tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(SourceError):
        prepare([tmp_path / "missing"], tokenizer, tmp_path / "out")
