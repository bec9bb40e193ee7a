"""Text in web servers and object stores: the right documents in spite of faults, or one clear line and nothing half left."""

from __future__ import annotations

import gzip
import json
import logging
import random
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install -e '.[remote]'")
pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e '.[remote]'")
pytest.importorskip("moto", reason="moto is not installed: pip install -e '.[test]'")

from moto.server import ThreadedMotoServer

from data_pipeline import remote
from data_pipeline.cli import main
from data_pipeline.corpus import ReadOptions, find_sources, iterate_texts
from data_pipeline.errors import MissingDependencyError, SourceError, StoreError
from data_pipeline.remote import RemoteFile, Retry

from .stores import FaultyServer, running

pytestmark = pytest.mark.timeout(120)

TEXTS = [f"{number} " + "".join(random.Random(number).choices("abc def", k=300)) for number in range(400)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
PLAIN = ("\n".join(TEXTS) + "\n").encode()
FILES = {"/a.jsonl": LINES, "/a.txt": PLAIN, "/a.jsonl.gz": gzip.compress(LINES), "/bom.txt": b"\xef\xbb\xbfalpha"}


IMPATIENT = Retry(attempts=4, backoff_seconds=0.01, timeout_seconds=20.0)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of hundredths of a second, buffers smaller than the files."""
    monkeypatch.setattr(remote, "RETRY", IMPATIENT)
    monkeypatch.setattr(remote, "BUFFER_BYTES", 1 << 14)


@pytest.fixture
def web() -> Iterator[FaultyServer]:
    with running(FaultyServer()) as server:
        server.files = dict(FILES)
        yield server


@pytest.fixture(scope="module")
def moto() -> Iterator[int]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def s3(moto: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """An S3 store behind a proxy that can fail."""
    import s3fs

    environment = {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1", "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # the library's own patience is not what is tested
    store = s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{moto}", skip_instance_cache=True)
    store.mkdirs("corpus", exist_ok=True)
    for path, data in {**FILES, "/sub/b.jsonl": LINES, "/sub/x.bin": b"\0"}.items():
        store.pipe(f"corpus{path}", data)
    s3fs.S3FileSystem.clear_instance_cache()
    with running(FaultyServer(upstream=moto)) as server:
        server.store = store
        server.only = r"^/corpus/.*\.(jsonl|txt|gz)"
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server
    s3fs.S3FileSystem.clear_instance_cache()


READS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "lines": ("a.jsonl", {}, TEXTS),
    "gzip": ("a.jsonl.gz", {}, TEXTS),
    "text by line": ("a.txt", {"text_unit": "line"}, TEXTS),
    "text by file": ("a.txt", {"text_unit": "file"}, [PLAIN.decode()]),
    "byte order mark": ("bom.txt", {}, ["alpha"]),
}
FAULTS = ["", "503", "429", "500", "cut", "reset", "short", "slow", "stall", "garbled"]


def read(source: str, **options: Any) -> list[str]:
    return list(iterate_texts([source], ReadOptions(**options)))


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no-ranges"])
@pytest.mark.parametrize("what", READS)
def test_a_web_server_gives_the_documents(web: FaultyServer, what: str, ranges: bool) -> None:
    name, options, texts = READS[what]
    web.ranges = ranges
    assert read(f"{web.url}/{name}", **options) == texts
    assert read(f"{web.url}/{name}?download=true", **options) == texts  # a query is neither a pattern nor a suffix
    assert {method for method, _, _ in web.requests} == {"HEAD", "GET"}


def test_chunks_of_remote_text_join_to_the_file(web: FaultyServer, s3: FaultyServer) -> None:
    for url in (f"{web.url}/a.txt", "s3://corpus/a.txt"):
        chunks = read(url, text_unit="chunk", chunk_bytes=1000)
        assert "".join(chunks) == PLAIN.decode() and len(chunks) > 50


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no-ranges"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_web_server_cost_time_and_no_data(
    web: FaultyServer, fault: str, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "stall":
        monkeypatch.setattr(remote, "RETRY", replace(IMPATIENT, timeout_seconds=0.3))
    web.ranges, web.faults = ranges, [fault] * 3
    assert read(f"{web.url}/a.jsonl") == TEXTS
    assert not web.faults or fault in ("", "slow")
    web.faults = [fault] * 3
    assert read(f"{web.url}/a.jsonl.gz") == TEXTS


def test_a_download_goes_on_where_it_broke(web: FaultyServer) -> None:
    web.files["/big.txt"] = PLAIN * 20  # more than a client holds in buffers, which a broken connection empties
    web.faults = ["cut", "cut"]
    assert read(f"{web.url}/big.txt", text_unit="line") == TEXTS * 20
    asked = [int(ranges[6:-1]) for method, _, ranges in web.requests if method == "GET" and ranges]
    assert len(asked) == 2 and 0 < asked[0] < asked[1]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("503", "the server answers 503 .*4 attempts"),
        ("cut", "4 attempts"),
        ("short", rf"it ended after \d+ of {len(LINES)} bytes \(4 attempts\)"),
        ("stall", "no answer in time .*4 attempts"),
        ("403", "the server answers 403"),
        ("410", "the server answers 410"),
    ],
)
def test_a_server_that_stays_bad_is_given_up_in_one_line(
    web: FaultyServer,
    tmp_path: Path,
    tokenizer_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    message: str,
) -> None:
    if fault == "stall":
        monkeypatch.setattr(remote, "RETRY", replace(IMPATIENT, timeout_seconds=0.3))
    web.lasting = fault
    argv = ["prepare", f"{web.url}/a.jsonl", "--tokenizer", str(tokenizer_path), "--out", str(tmp_path / "out")]
    assert main([*argv, "--held-out", "0"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line
    assert not list(tmp_path.rglob("manifest.json")) and not list(tmp_path.rglob("shard-*.tar"))
    gets = sum(method == "GET" for method, _, _ in web.requests)
    assert gets == (1 if fault in ("403", "410") else 4) or fault in (
        "cut",
        "short",
        "stall",
    )  # these make progress at first
    web.lasting = ""
    assert main([*argv, "--held-out", "0"]) == 0  # the same command, the server well again
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["report"]["documents_in"] == len(TEXTS)


@pytest.mark.parametrize("announced", [len(LINES) - 100, len(LINES) + 100])
def test_a_length_that_is_not_the_announced_one_is_said(web: FaultyServer, announced: int) -> None:
    web.announced = announced
    with pytest.raises(StoreError, match=rf"(more than the|of) {announced} bytes"):
        read(f"{web.url}/a.jsonl")


def test_what_changes_while_it_is_read_is_refused(web: FaultyServer) -> None:
    web.headers = {"ETag": '"one"'}
    file = RemoteFile(f"{web.url}/a.jsonl", len(LINES))
    file.read(100)
    file._drop()  # as after a broken connection
    web.headers = {"ETag": '"two"'}
    with pytest.raises(StoreError, match="changed while it was read"):
        file.read(100)


def test_files_come_as_they_are_stored(web: FaultyServer) -> None:
    """Servers mark .gz files with Content-Encoding, and clients that believe it decompress them twice."""
    web.headers = {"Content-Encoding": "gzip"}
    assert read(f"{web.url}/a.jsonl.gz") == TEXTS


def test_parquet_needs_no_ranges(web: FaultyServer, s3: FaultyServer, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    parquet.write_table(pyarrow.table({"text": TEXTS, "n": list(range(len(TEXTS)))}), tmp_path / "a.parquet")
    web.files["/a.parquet"] = (tmp_path / "a.parquet").read_bytes()
    for ranges in (True, False):
        web.ranges, web.faults = ranges, ["cut", "503"]
        assert read(f"{web.url}/a.parquet") == TEXTS
    s3.store.mkdirs("tables", exist_ok=True)
    s3.store.pipe("tables/a.parquet", web.files["/a.parquet"])
    s3.only, s3.faults = r"\.parquet", ["cut", "503"]
    assert read("s3://tables/a.parquet") == TEXTS


# ---- S3 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", READS)
def test_an_object_store_gives_the_documents(s3: FaultyServer, what: str) -> None:
    name, options, texts = READS[what]
    assert read(f"s3://corpus/{name}", **options) == texts


@pytest.mark.parametrize("fault", ["503", "500", "cut", "reset", "slow"])
def test_faults_of_an_object_store_cost_time_and_no_data(s3: FaultyServer, fault: str) -> None:
    s3.faults = [fault] * (1 if fault == "slow" else 3)
    assert read("s3://corpus/a.jsonl") == TEXTS
    assert not s3.faults


@pytest.mark.parametrize("fault", ["503", "429", "reset", "garbled"])
def test_the_first_questions_are_asked_again_too(web: FaultyServer, fault: str) -> None:
    web.heads, web.faults = True, [fault] * 4
    assert read(f"{web.url}/a.jsonl") == TEXTS


def test_directories_and_patterns_of_a_store(s3: FaultyServer) -> None:
    found = find_sources(["s3://corpus"])
    assert [file.path for file in found.files] == [
        "s3://corpus/a.jsonl", "s3://corpus/a.jsonl.gz", "s3://corpus/a.txt", "s3://corpus/bom.txt", "s3://corpus/sub/b.jsonl"
    ]  # fmt: skip
    assert found.left_out.counts == {"kind .bin": 1}
    assert [file.size for file in found.files] == [len(FILES[p]) for p in sorted(FILES)] + [len(LINES)]
    assert all(file.modified for file in found.files)
    assert [file.path for file in find_sources(["s3://corpus/*.jsonl"]).files] == ["s3://corpus/a.jsonl"]


@pytest.mark.parametrize("url", ["s3://corpus/none.jsonl", "s3://no-such-bucket/a.jsonl", "s3://corpus/*.nope"])
def test_missing_objects_are_said_at_once(s3: FaultyServer, url: str) -> None:
    with pytest.raises(SourceError, match=r"no such object|matches no object"):
        find_sources([url])


def test_an_interrupted_preparation_from_a_store_ends_with_the_same_shards(
    s3: FaultyServer, tmp_path: Path, tokenizer_path: Path
) -> None:
    argv = ["--tokenizer", str(tokenizer_path), "--held-out", "0", "--shard-tokens", "5000", "--workers", "1"]
    assert main(["prepare", "s3://corpus/a.jsonl", *argv, "--out", str(tmp_path / "whole")]) == 0
    s3.faults = ["", "403"]  # after the first block
    import s3fs

    s3fs.S3FileSystem.default_block_size, before = 1 << 15, s3fs.S3FileSystem.default_block_size
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        assert main(["prepare", "s3://corpus/a.jsonl", *argv, "--out", str(tmp_path / "cut")]) == 2
        assert not (tmp_path / "cut" / "train" / "manifest.json").exists()
        assert main(["prepare", "s3://corpus/a.jsonl", *argv, "--out", str(tmp_path / "cut")]) == 0
    finally:
        s3fs.S3FileSystem.default_block_size = before
    manifests = [(tmp_path / name / "train" / "manifest.json").read_bytes() for name in ("whole", "cut")]
    assert manifests[0] == manifests[1]


# ---- nobody there --------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.jsonl"
        with pytest.raises(StoreError, match=r"cannot read http://.*\(4 attempts\)"):
            find_sources([url])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StoreError, match=r"pip install gcsfs.*\.\[gcs\]"):
        find_sources(["gs://bucket/a.jsonl"])
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(MissingDependencyError, match=r"pip install aiohttp.*\.\[remote\]"):
        find_sources(["https://host/a.jsonl"])
    with pytest.raises(StoreError, match=r"[Pp]rotocol not known"):
        find_sources(["nonsense://bucket/a.jsonl"])
