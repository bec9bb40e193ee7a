"""Files as people have them: what is kept, what is rejected and what is left out, each counted under the right name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import socket
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from backports import zstd

from data_pipeline.cli import main
from data_pipeline.corpus import ReadOptions, Rejected, document_text, find_sources, iterate_texts, read_documents
from data_pipeline.errors import EmptySplitError, SourceError
from data_pipeline.prepare import prepare
from data_pipeline.report import PrepareReport
from data_pipeline.tokenizer import Tokenizer

BOM = b"\xef\xbb\xbf"
TWO = [{"text": "alpha"}, {"text": "beta"}]
LINES = b"".join(json.dumps(record).encode() + b"\n" for record in TWO)
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".zst": zstd.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
}  # fmt: skip


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet_of(column: Any, name: str = "text") -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({name: column}), buffer)
    return buffer.getvalue()


def bad_strings(kind: str) -> Any:
    """Five values of which the third is no UTF-8, in each of Arrow's types for text."""
    import pyarrow

    values = [b"one", b"two", b"bad \xff", b"four", b"five"]
    if kind == "binary":
        return pyarrow.array(values)
    offset = pyarrow.large_binary() if kind == "large_string" else pyarrow.binary()
    raw = pyarrow.array(values, offset)
    text = pyarrow.large_string() if kind == "large_string" else pyarrow.string()
    array = pyarrow.Array.from_buffers(text, 5, raw.buffers())
    return array.dictionary_encode() if kind == "dictionary" else array


@dataclass
class Case:
    """A source file of this name and content, and what must become of it."""

    name: str
    data: bytes
    texts: list[str] | None = None  # None: those of TWO
    rejected: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def texts_and_rejections(source: Path | str, **options: Any) -> tuple[list[str], dict[str, int]]:
    read = ReadOptions(**options)
    texts: list[str] = []
    rejected: Counter[str] = Counter()
    for file in find_sources([source]).files:
        for document in read_documents(file, read):
            try:
                texts.append(document_text(document, read.text_field))
            except Rejected as reason:
                rejected[str(reason)] += 1
    return texts, dict(rejected)


PRETTY = json.dumps(TWO[0], indent=2).encode() + b"\n" + json.dumps(TWO[1], indent=2).encode()
CASES = [
    # JSON under the names that C4, Dolma and others use
    *(Case(f"part.json{suffix}", compress(LINES)) for suffix, compress in COMPRESS.items()),
    Case("lines.json", LINES),
    Case("array.json", json.dumps(TWO).encode()),
    Case("array-over-lines.json", json.dumps(TWO, indent=2).encode()),
    Case("array.json.zst", zstd.compress(json.dumps(TWO).encode())),
    Case("pretty.json", PRETTY),
    Case("one-object.json", json.dumps(TWO[0], indent=1).encode(), ["alpha"]),
    Case("two-arrays.json", b'[{"text": "alpha"}]\n[{"text": "beta"}]\n'),
    Case("lines-with-commas.json", b'{"text": "alpha"},\n{"text": "beta"},\n'),
    Case("brackets-in-text.json", b'[{"text": "a ] } \\" [ { , b"}]', ['a ] } " [ { , b']),
    Case("blank-lines.json", b"\n \n" + LINES),
    Case("broken-first-line.json", b"{broken\n" + LINES, None, {"bad_json": 1}),
    Case("cut-first-line.json", b'{"text": "al\n' + LINES, None, {"bad_json": 1}),
    Case("scalars-in-array.json", b'[1, "x", null, {"text": "alpha"}, {"text": "beta"}]', None, {"missing_field": 3}),
    Case("bad-element.json", b'[{"text": alpha}, {"text": "alpha"}, {"text": "beta"}]', None, {"bad_json": 1}),
    Case("empty.json", b"", []),
    Case("empty-array.json", b"[]", []),
    # capitals
    Case("P.JSONL.GZ", gzip.compress(LINES)),
    Case("P.JSONL.ZST", zstd.compress(LINES)),
    Case("P.Json.Gz", gzip.compress(LINES)),
    Case("P.TXT.GZ", gzip.compress(b"alpha\nbeta"), options={"text_unit": "line"}),
    Case("P.TXT.BZ2", bz2.compress(b"alpha\nbeta"), options={"text_unit": "line"}),
    # byte order marks
    Case("bom.jsonl", BOM + LINES),
    Case("bom-in-the-middle.jsonl", LINES.splitlines()[0] + b"\n" + BOM + LINES.splitlines()[1]),
    Case("bom.jsonl.gz", gzip.compress(BOM + LINES)),
    Case("bom.json", BOM + json.dumps(TWO).encode()),
    Case("bom-pretty.json", BOM + PRETTY),
    Case("bom.txt", BOM + b"alpha", ["alpha"]),
    Case("bom-lines.txt", BOM + b"alpha\nbeta\n", options={"text_unit": "line"}),
    Case("bom-chunks.txt", BOM + b"alpha\nbeta\n", ["alpha\n", "beta\n"], options={"text_unit": "chunk", "chunk_bytes": 4}),
    Case("bom.txt.xz", lzma.compress(BOM + b"alpha"), ["alpha"]),
    # compressions
    Case("a.jsonl.bz2", bz2.compress(LINES)),
    Case("a.jsonl.xz", lzma.compress(LINES)),
    Case("a.jsonl.lzma", lzma.compress(LINES, lzma.FORMAT_ALONE)),
    Case("two-frames.jsonl.zst", b"".join(map(zstd.compress, LINES.splitlines(keepends=True)))),
    Case("two-streams.jsonl.bz2", b"".join(map(bz2.compress, LINES.splitlines(keepends=True)))),
    Case("two-streams.jsonl.xz", b"".join(map(lzma.compress, LINES.splitlines(keepends=True)))),
    Case("long-window.jsonl.zst", zstd.compress(LINES, options={zstd.CompressionParameter.window_log: 28,
                                                                zstd.CompressionParameter.content_size_flag: 0})),
    # nested fields
    Case("nested.jsonl", b'{"meta": {"text": "alpha"}}\n{"meta": {"x": 1}}\n', ["alpha"], {"missing_field": 1},
         {"text_field": "meta.text"}),
    Case("dotted-name.jsonl", b'{"meta.text": "alpha", "meta": {"text": "no"}}\n', ["alpha"], {}, {"text_field": "meta.text"}),
    # tars
    Case("a.tar", tar_of({"x.txt": b"alpha", "d/y.jsonl": LINES.splitlines()[1]}), ["alpha", "beta"]),
    Case("a.tar.zst", zstd.compress(tar_of({"x.json": json.dumps(TWO).encode()}))),
    Case("a.tgz", gzip.compress(tar_of({"x.jsonl.gz": gzip.compress(LINES), "x.jpg": b"..."})), None, {"other_kind": 1}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_files_give_their_documents(tmp_path: Path, case: Case) -> None:
    path = tmp_path / case.name
    path.write_bytes(case.data)
    expected = (["alpha", "beta"] if case.texts is None else case.texts, case.rejected)
    assert texts_and_rejections(path, **case.options) == expected  # named
    assert texts_and_rejections(f"{tmp_path}/*", **case.options) == expected  # by a pattern
    assert texts_and_rejections(tmp_path, **case.options) == expected  # in a directory


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary", "binary"])
def test_an_invalid_string_of_parquet_costs_no_other(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet_of(bad_strings(kind)))
    assert texts_and_rejections(tmp_path) == (["one", "two", "four", "five"], {"bad_utf8": 1})


def test_struct_columns_of_parquet_are_read_by_dotted_names(tmp_path: Path) -> None:
    structs = [{"id": 1, "text": "alpha"}, None, {"id": 2, "text": None}, {"id": 3, "text": "beta"}]
    (tmp_path / "a.parquet").write_bytes(parquet_of(structs, "meta"))
    assert texts_and_rejections(tmp_path, text_field="meta.text") == (["alpha", "beta"], {"missing_field": 2})
    with pytest.raises(SourceError, match=r"no column 'text', only meta\.id, meta\.text\. .*--text-field"):
        texts_and_rejections(tmp_path)
    with pytest.raises(SourceError, match=r"'meta\.id' of .* holds int64, not text"):
        texts_and_rejections(tmp_path, text_field="meta.id")


# ---- cut files -----------------------------------------------------------------------------------------------------


def many_lines(count: int = 3000, seed: int = 0) -> bytes:
    generator = random.Random(seed)
    texts = (f"{i} " + "".join(generator.choices("abcdef gh", k=200)) for i in range(count))
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def cut_files() -> dict[str, tuple[bytes, int]]:
    """Files that break off, by name, with the least number of documents that come before the break."""
    lines = many_lines()
    whole = lines[: len(lines) // 2].rsplit(b"\n", 1)[0] + b"\n"
    same = b'{"text": "again and again"}\n' * 20_000
    files: dict[str, tuple[bytes, int]] = {}
    for suffix, compress in COMPRESS.items():
        packed = compress(lines)
        files[f"half.jsonl{suffix}"] = packed[: len(packed) // 2], 0 if suffix == ".bz2" else 100
        files[f"last-byte.jsonl{suffix}"] = packed[:-1], 100
        if suffix != ".lzma":  # a format of one stream
            files[f"later-frame.jsonl{suffix}"] = compress(whole) + packed[:9], whole.count(b"\n")
        packed = compress(same)
        files[f"compressible.jsonl{suffix}"] = packed[: len(packed) // 2], 0
        packed = compress(lines)
        files[f"half.txt{suffix}"] = packed[: len(packed) // 2], 0
        packed = compress(json.dumps(TWO).encode())
        files[f"half.json{suffix}"] = packed[: len(packed) // 2], 0
    window = {zstd.CompressionParameter.window_log: 28, zstd.CompressionParameter.content_size_flag: 0}
    packed = zstd.compress(lines, options=window)
    files["long-window.jsonl.zst"] = packed[: len(packed) // 2], 100
    files["array.json"] = json.dumps(TWO * 50).encode()[:-9], 99
    files["pretty.json"] = PRETTY[:-1], 1
    tar = tar_of({"a.txt": b"alpha", "b.txt": b"beta" * 300})
    files["in-a-member.tar"] = tar[:2000], 1
    files["between-members.tar"] = tar[:1024], 1
    files["in-a-header.tar"] = tar[:1100], 1
    files["no-end-mark.tar"] = tar[: 1024 + 512 + 1536], 2
    files["joined.tar"] = tar + tar, 2
    files["half.tar.zst"] = zstd.compress(tar)[:-9], 0
    files["half.parquet"] = b"PAR1" + b"x" * 200, 0
    return files


CUT = cut_files()


@pytest.mark.parametrize("name", CUT)
def test_a_file_that_breaks_off_is_unreadable_once_and_loses_nothing_before(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    data, at_least = CUT[name]
    (tmp_path / name).write_bytes(data)
    texts, rejected = texts_and_rejections(tmp_path)
    assert rejected == {"unreadable": 1}
    assert f"{name} cannot be read beyond document {len(texts)}" in caplog.text
    assert len(texts) >= at_least
    if name.endswith((".txt", ".txt.gz", ".txt.zst", ".txt.bz2", ".txt.xz", ".txt.lzma")):
        assert texts == []  # half a document is none


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_cut_of_a_small_file_is_seen(tmp_path: Path, suffix: str) -> None:
    packed = COMPRESS[suffix](many_lines(3))
    for length in range(1, len(packed)):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(packed[:length])
        _, rejected = texts_and_rejections(tmp_path)
        assert rejected == {"unreadable": 1}, length


# ---- directories ---------------------------------------------------------------------------------------------------


def make_directory(root: Path) -> Path:
    """Readable files among everything else that a directory can hold."""
    inside, outside = root / "in", root / "outside"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    for name in ("a.txt", "sub/b.jsonl", "c.JSON.GZ"):
        (inside / name).write_bytes({".gz": gzip.compress(LINES)}.get(Path(name).suffix.lower(), LINES))
    for name in ("x.bin", "y.bin", "z.zip", "README", "sub/w.bin"):
        (inside / name).write_bytes(b"\0\1")
    (outside / "secret.txt").write_text("secret")
    os.mkfifo(inside / "p.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(inside / "s.txt"))
    (inside / "dangling.txt").symlink_to("nowhere")
    (inside / "self.txt").symlink_to("self.txt")
    (inside / "null.txt").symlink_to("/dev/zero")
    (inside / "out.txt").symlink_to(outside / "secret.txt")
    (inside / "out").symlink_to(outside)
    (inside / "again.txt").symlink_to("a.txt")
    (inside / "sub" / "up").symlink_to("..")
    (outside / "back").symlink_to(inside)
    (outside / "round").symlink_to(outside)
    return inside


LEFT_OUT = {
    "kind .bin": 3, "kind .zip": 1, "kind without suffix": 1, "named pipe": 1, "socket": 1, "broken link": 1,
    "circular link": 1, "link to a file that is read anyway": 1, "link to a directory that is read anyway": 1,
}  # fmt: skip


@pytest.mark.timeout(30)
def test_a_directory_gives_its_files_and_counts_the_rest(tmp_path: Path) -> None:
    inside = make_directory(tmp_path)
    found = find_sources([inside])
    assert [os.path.relpath(file.path, inside) for file in found.files] == ["a.txt", "c.JSON.GZ", "sub/b.jsonl"]
    assert found.left_out.counts == {**LEFT_OUT, "link out of the source": 3}
    assert found.left_out.names["kind .bin"] == ["x.bin", "y.bin", "sub/w.bin"]


@pytest.mark.timeout(30)
def test_links_out_are_followed_on_request_and_loops_are_cut(tmp_path: Path) -> None:
    inside = make_directory(tmp_path)
    found = find_sources([inside], follow_links=True)
    names = [os.path.relpath(file.path, inside) for file in found.files]
    assert names == ["a.txt", "c.JSON.GZ", "out/secret.txt", "sub/b.jsonl"]
    assert found.left_out.counts == {
        **LEFT_OUT, "device": 1, "link to a file that is read anyway": 2, "link to a directory that is read anyway": 3,
    }  # fmt: skip


@pytest.mark.timeout(30)
def test_patterns_leave_out_what_is_no_text_too(tmp_path: Path) -> None:
    inside = make_directory(tmp_path)
    found = find_sources([f"{inside}/*.txt"])
    assert [Path(file.path).name for file in found.files] == ["a.txt"]
    assert set(found.left_out.counts) == {
        "named pipe", "socket", "broken link", "circular link", "link out of the source",
        "link to a file that is read anyway",
    }  # fmt: skip
    (inside / "server.log").write_text("a line")
    assert [Path(file.path).name for file in find_sources([f"{inside}/*.log"]).files] == ["server.log"]


def test_links_of_a_cache_to_its_blobs_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0a1b").write_bytes(LINES)
    for revision in ("r1", "r2"):
        (tmp_path / "snapshots" / revision).mkdir(parents=True)
        (tmp_path / "snapshots" / revision / "train.jsonl").symlink_to("../../blobs/0a1b")
    assert texts_and_rejections(tmp_path) == (["alpha", "beta"], {})
    with pytest.raises(SourceError, match=r"1 link out of the source .*--follow-links"):
        find_sources([tmp_path / "snapshots" / "r1"])
    assert len(find_sources([tmp_path / "snapshots" / "r1"], follow_links=True).files) == 1


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("p.txt", "is a named pipe, not a regular file"),
        ("s.txt", "is a socket, not a regular file"),
        ("null.txt", "is a device, not a regular file"),
        ("dangling.txt", "is a broken link"),
        ("self.txt", "is a circular link"),
        ("z.zip", "files of kind .zip are not read. Unpack it"),
        ("t.csv", "files of kind .csv are not read. Convert it, for example to JSON lines"),
        ("t.TSV.gz", "files of kind .tsv are not read. Convert it"),
    ],
)
def test_what_cannot_be_read_is_refused_in_plain_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    path = make_directory(tmp_path) / name
    if not os.path.lexists(path):
        path.write_text("text\na\n")
    assert main(["prepare", str(path), "--tokenizer", "none.model", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_the_report_names_what_was_left_out(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "prepare",
        str(make_directory(tmp_path)),
        "--tokenizer",
        str(tokenizer_path),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*argv, "--held-out", "0"]) == 0
    said = capsys.readouterr().out
    assert "files read                       3" in said
    assert "kind .bin                      3   left out: x.bin, y.bin, sub/w.bin\n" in said
    assert "named pipe                     1   left out: p.txt\n" in said
    summary = json.loads((tmp_path / "out" / "prepare.json").read_text())["report"]
    assert summary["left_out"]["broken link"] == {"files": 1, "names": ["dangling.txt"]}
    assert main([*argv, "--held-out", "0", "--json"]) == 0  # run again: the same report
    assert json.loads(capsys.readouterr().out)["left_out"] == summary["left_out"]


# ---- messages ------------------------------------------------------------------------------------------------------


def test_other_fields_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [{"content": "abc def", "id": 1}, {"content": "ghi", "meta": {"author": "x"}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    expected = r"their text fields are content, meta\.author\. Name the right one with --text-field"
    with pytest.raises(EmptySplitError, match=rf"missing_field 2\).*no text under 'text'.*{expected}"):
        prepare([tmp_path], tokenizer, tmp_path / "out", held_out_fraction=0.0)
    with pytest.raises(SourceError, match=expected):
        list(iterate_texts([tmp_path]))
    (tmp_path / "b.txt").write_text("some text")
    report = prepare([tmp_path], tokenizer, tmp_path / "out", held_out_fraction=0.0)
    assert report.rejected == {"missing_field": 2} and report.text_fields == ["content", "meta.author"]
    assert "their text fields are content, meta.author" in report.describe()


def test_progress_moves_inside_one_file(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline import prepare as module

    (tmp_path / "one.jsonl.gz").write_bytes(gzip.compress(many_lines(6000)))
    clock = iter(range(10**9))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))  # a second passes with every document
    parts: list[float | None] = []

    def show(report: PrepareReport, part: float | None) -> None:
        parts.append(part)

    prepare(
        [tmp_path], tokenizer, tmp_path / "out", held_out_fraction=0.0, workers=1, progress=show, commit_seconds=1e9
    )
    known = [part for part in parts if part is not None]
    assert len(known) == len(parts) and known == sorted(known) and known[-1] == 1.0
    assert any(0.2 < part < 0.4 for part in known) and any(0.6 < part < 0.8 for part in known)
