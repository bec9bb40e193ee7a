from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path

import pytest

from data_pipeline.corpus import (
    Document,
    ReadOptions,
    Rejected,
    document_text,
    expand_sources,
    iterate_texts,
    python_stdlib_documents,
    read_documents,
)
from data_pipeline.errors import MissingDependencyError, SourceError, require

TEXTS = ["first caf\u00e9", "second\twith tab", "third"]


def read_all(path: Path | str, **options: object) -> list[Document]:
    read = ReadOptions(**options)  # type: ignore[arg-type]
    return [document for file in expand_sources([path]) for document in read_documents(file, read)]


def texts_of(documents: list[Document]) -> list[str]:
    return [document_text(document) for document in documents]


def problems_of(documents: list[Document]) -> list[str | None]:
    problems: list[str | None] = []
    for document in documents:
        try:
            document_text(document)
            problems.append(None)
        except Rejected as reason:
            problems.append(str(reason))
    return problems


def json_lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("compress", [None, "gz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_plain_and_compressed_files_give_the_same_documents(tmp_path: Path, compress: str | None, kind: str) -> None:
    data = json_lines(TEXTS) if kind == "jsonl" else "\n".join(TEXTS).encode()
    path = tmp_path / f"a.{kind}"
    if compress == "gz":
        path, data = path.with_suffix(f".{kind}.gz"), gzip.compress(data)
    elif compress == "zst":
        zstd = pytest.importorskip("backports.zstd", reason="backports.zstd is not installed")
        path, data = path.with_suffix(f".{kind}.zst"), zstd.compress(data)
    path.write_bytes(data)
    documents = read_all(path, text_unit="line")
    assert texts_of(documents) == TEXTS
    assert [document.position for document in documents] == [0, 1, 2]


def test_parquet_column_is_read_by_name(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    parquet.write_table(pyarrow.table({"body": [*TEXTS, None], "id": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    documents = read_all(tmp_path / "a.parquet", text_field="body")
    assert texts_of(documents[:3]) == TEXTS
    assert problems_of(documents[3:]) == ["missing_field"]
    with pytest.raises(SourceError, match=r"no column 'text', only body, id"):
        read_all(tmp_path / "a.parquet")


def test_directories_and_globs_expand_sorted_and_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.jsonl", "ignored.bin"):
        (tmp_path / name).write_text("{}")
    names = [os.path.relpath(file.path, tmp_path) for file in expand_sources([tmp_path])]
    assert names == ["a.txt", "b.txt", "sub/c.jsonl"]
    twice = expand_sources([f"{tmp_path}/*.txt", tmp_path / "a.txt", f"{tmp_path}/**/*.jsonl"])
    assert [os.path.relpath(file.path, tmp_path) for file in twice] == names


def test_urls_are_read_through_fsspec(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/b.jsonl", json_lines(TEXTS))
    memory.pipe("/corpus/a.txt.gz", gzip.compress(b"zero"))
    try:
        assert list(iterate_texts(["memory://corpus/*"])) == ["zero", *TEXTS]
        assert list(iterate_texts(["memory://corpus"])) == ["zero", *TEXTS]
        with pytest.raises(SourceError, match="no such object"):
            expand_sources(["memory://nothing/here.txt"])
    finally:
        memory.rm("/corpus", recursive=True)


def test_a_store_that_fails_stops_the_reading_instead_of_losing_documents(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    memory = fsspec.filesystem("memory")
    memory.pipe("/gone/a.jsonl", json_lines(TEXTS))
    files = expand_sources(["memory://gone/a.jsonl"])
    memory.rm("/gone", recursive=True)
    with pytest.raises(SourceError, match="no such object"):
        list(read_documents(files[0]))


def test_chunks_join_to_the_file_again(tmp_path: Path) -> None:
    text = "".join(f"line {i} \u00e9\n" * (i % 5) + "\n" for i in range(200)) + "no line end"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    chunks = texts_of(read_all(tmp_path / "a.txt", text_unit="chunk", chunk_bytes=300))
    assert "".join(chunks) == text
    assert len(chunks) > 5 and all(300 <= len(chunk.encode()) < 320 for chunk in chunks[:-1])


def test_every_bad_document_is_counted_with_its_reason(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}', b"", b'{"text": 5}', b'{"other": "x"}', b"[1]", b"{broken", b'{"text": "\xff"}',
        b'{"text": "\\ud800"}', b'{"text": "' + b"x" * 200 + b'"}', b"[" * 90, b'{"text": "last"}\r',
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    documents = read_all(tmp_path / "a.jsonl", max_document_bytes=100)
    assert problems_of(documents) == [
        None, "empty", "missing_field", "missing_field", "missing_field", "bad_json", "bad_utf8", "bad_utf8",
        "too_long", "bad_json", None,
    ]  # fmt: skip


@pytest.mark.parametrize("size", [99, 100, 101, 102, 103, 5_000_000])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_long_lines_are_passed_over_whole(tmp_path: Path, size: int, end: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(b"before\n" + b"x" * size + end + (b"after" if end else b""))
    documents = read_all(tmp_path / "a.txt", text_unit="line", max_document_bytes=100)
    expected = [None, None if size <= 100 else "too_long"] + ([None] if end else [])
    assert problems_of(documents) == expected
    assert documents[0].data == b"before" and (not end or documents[2].data == b"after")


def test_long_files_and_empty_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 101)
    (tmp_path / "b.txt").write_bytes(b"")
    documents = read_all(tmp_path, max_document_bytes=100)
    assert [(d.problem, d.data) for d in documents] == [("too_long", b""), (None, b"")]


def test_broken_archives_end_with_one_counted_document(tmp_path: Path) -> None:
    whole = gzip.compress(json_lines([f"{i} {os.urandom(30).hex()}" for i in range(1000)]))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no.jsonl.gz").write_bytes(b"not gzip at all")
    documents = read_all(tmp_path / "cut.jsonl.gz")
    assert documents[-1].problem == "unreadable" and len(documents) > 10
    assert all(document.problem is None for document in documents[:-1])
    assert [document.problem for document in read_all(tmp_path / "no.jsonl.gz")] == ["unreadable"]
    (tmp_path / "no.parquet").write_bytes(b"not parquet")
    assert [document.problem for document in read_all(tmp_path / "no.parquet")] == ["unreadable"]


def test_a_gzip_bomb_line_needs_bounded_memory(tmp_path: Path) -> None:
    tracemalloc = pytest.importorskip("tracemalloc")
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb") as file:
        for _ in range(64):
            file.write(b"x" * (1 << 20))
        file.write(b"\nshort\n")
    (tmp_path / "a.txt.gz").write_bytes(buffer.getvalue())
    tracemalloc.start()
    documents = read_all(tmp_path / "a.txt.gz", text_unit="line", max_document_bytes=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert problems_of(documents) == ["too_long", None]
    assert peak < 8 << 20


def test_missing_sources_say_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "no.txt", "does not exist"),
        (f"{tmp_path}/*.nope", "matches no file"),
        (tmp_path / "empty", "holds no file"),
    ):
        with pytest.raises(SourceError, match=message):
            expand_sources([source])
    with pytest.raises(SourceError, match="no source"):
        expand_sources([])


def test_standard_library_is_a_deterministic_corpus() -> None:
    documents = list(python_stdlib_documents())
    names = [document.source for document in documents]
    assert names == sorted(names) and len(set(names)) == len(names) > 200
    assert {"python-stdlib/abc.py", "python-stdlib/json/decoder.py"} <= set(names)
    assert not any("/test/" in name or "site-packages" in name for name in names)


def test_a_missing_package_is_named_with_its_extra() -> None:
    with pytest.raises(MissingDependencyError, match=r"reading x\.zst needs .* 'no-such'.*\.\[data\]"):
        require("no_such_package", purpose="reading x.zst", install="no-such")
