"""Files that Megatron-Core's own builder wrote become the shards that tokenizing the text here gives."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import Manifest, Tokenizer, train_tokenizer
from data_pipeline.cli import main
from data_pipeline.errors import SourceError
from data_pipeline.import_indexed import import_indexed
from data_pipeline.indexed import IndexedFile
from data_pipeline.inspection import document_at, find_tokenizer, verify
from data_pipeline.prepare import prepare

TEXTS = [f"document {i} says {' '.join(str(j * i) for j in range(i % 7 + 1))}\n" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("t") / "tokenizer.model", 300)


@pytest.fixture(scope="module", params=[np.int32, np.uint16])
def prefix(request, tmp_path_factory, tokenizer) -> str:
    """Each document ends with an end mark; document 5 has two sequences, and the last one nothing but its mark."""
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    prefix = str(tmp_path_factory.mktemp("megatron") / "corpus_text_document")
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=request.param)
    for number, text in enumerate([*TEXTS, ""]):
        ids = [*tokenizer.encode(text).tolist(), tokenizer.eos_id]
        lengths = [3, len(ids) - 3] if number == 5 else [len(ids)]
        builder.add_document(np.array(ids, request.param), lengths)
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_the_result_is_that_of_tokenizing_here(prefix, tokenizer, tmp_path):
    report = import_indexed([prefix], tokenizer, tmp_path / "imported", held_out_fraction=0.2, workers=2)
    assert (report.documents_in, report.rejected) == (61, {"empty": 1})
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare([tmp_path / "text.jsonl"], tokenizer, tmp_path / "prepared", held_out_fraction=0.2, workers=1)
    for split in ("train", "heldout"):
        ours, theirs = (Manifest.load(tmp_path / name / split) for name in ("imported", "prepared"))
        assert (ours.documents, ours.tokens) == (theirs.documents, theirs.tokens) and ours.documents > 0
        for number in range(ours.documents):
            (tokens, where), (expected, origin) = document_at(ours, number), document_at(theirs, number)
            assert tokens.tolist() == expected.tolist() and where["sha256"] == origin["sha256"]
            assert where["position"] == origin["position"] and where["source"].endswith("corpus_text_document.bin")
        assert verify(ours, find_tokenizer(ours)).problems == []


def test_the_command_says_what_it_would_read(prefix, tmp_path, capsys):
    command = ["import", f"{prefix}.idx", "--tokenizer", "none", "--out", str(tmp_path / "x"), "--dry-run", "--json"]
    assert main(command) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["documents"] == 61 and found["tokens"] == IndexedFile(prefix).num_tokens
    assert not (tmp_path / "x").exists()


def test_ids_of_another_tokenizer_are_refused(prefix, tmp_path, capsys):
    small = train_tokenizer(["a b c"], tmp_path / "small.model", 264)
    small.save(tmp_path / "small.model")
    arguments = ["import", prefix, "--tokenizer", str(tmp_path / "small.model"), "--out", str(tmp_path / "x")]
    assert main([*arguments, "--workers", "1"]) == 2
    assert "outside the vocabulary of 264: name the tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda idx: b"TNTIDX" + idx[6:], "older TNTIDX format"),
        (lambda idx: b"PK" + idx[2:], "no index of Megatron"),
        (lambda idx: idx[:20], "cut at 20 bytes"),
        (lambda idx: idx[:-8], "bounds take"),
        (lambda idx: idx[:17] + b"\x07" + idx[18:], "dtype code 7"),
        (lambda idx: idx[:34] + struct.pack("<i", 1 << 30) + idx[38:], "does not describe"),
        (lambda idx: idx[:34] + struct.pack("<i", -1) + idx[38:], "does not describe"),
        (lambda idx: idx[:-8] + struct.pack("<q", 1), "does not describe"),
    ],
)
def test_damage_is_named(prefix, tmp_path, damage, words):
    (tmp_path / "x.bin").write_bytes(Path(f"{prefix}.bin").read_bytes())
    (tmp_path / "x.idx").write_bytes(damage(Path(f"{prefix}.idx").read_bytes()))
    with pytest.raises(SourceError, match=words):
        IndexedFile(tmp_path / "x")
    with pytest.raises(SourceError, match="is the two files"):
        IndexedFile(tmp_path / "y")
