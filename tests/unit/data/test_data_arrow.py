"""Arrow files and directories that the datasets library saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.corpus import document_text, find_sources, read_documents
from data_pipeline.errors import SourceError
from data_pipeline.items import ReadOptions

pyarrow = pytest.importorskip("pyarrow")

TEXTS = [f"row {i} of Arrow" for i in range(25)]


def write(path: Path, kind: str, texts: list[str | None] = TEXTS) -> Path:
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    return path


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_both_formats(tmp_path, kind):
    (file,) = find_sources([write(tmp_path / "x.arrow", kind, [*TEXTS, None])]).files
    documents = list(read_documents(file))
    assert [document_text(document) for document in documents[:-1]] == TEXTS
    assert documents[-1].problem == "missing_field"
    with pytest.raises(SourceError, match="has no column 'body', only id, text"):
        list(read_documents(file, ReadOptions(text_field="body")))


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_a_cut_file_ends_with_one_unreadable_document(tmp_path, kind):
    path = write(tmp_path / "x.arrow", kind)
    path.write_bytes(path.read_bytes()[:-300])
    (file,) = find_sources([path]).files
    documents = list(read_documents(file))
    assert documents[-1].problem == "unreadable"
    assert [document_text(document) for document in documents[:-1]] == TEXTS[: len(documents) - 1]


def test_a_directory_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {"train": datasets.Dataset.from_dict({"text": TEXTS}), "test": datasets.Dataset.from_dict({"text": ["t"]})}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    found = find_sources([tmp_path / "set"])
    assert found.left_out.counts == {"description of a data set": 5}
    texts = [document_text(document) for file in found.files for document in read_documents(file)]
    assert sorted(texts) == sorted([*TEXTS, "t"])
