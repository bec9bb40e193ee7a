"""Hostile tars, with an index and digests made to fit: nothing is unpacked, run or unpickled, and none is accepted."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import CorruptShardError, SamplingError, ShardError, TokenRangeError
from data_pipeline.inspection import verify
from data_pipeline.manifest import Manifest, ShardInfo
from data_pipeline.shards import ShardReader
from data_pipeline.stream import TokenStream

CANARY = "hope-data-canary"
TOKENS = np.arange(10, 30, dtype="<u2")


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.mkdir, (CANARY,)  # type: ignore[return-value]


@dataclass
class Member:
    name: str
    data: bytes = b""
    type: bytes = tarfile.REGTYPE
    link: str = ""
    mode: int = 0o644


def build(directory: Path, members: list[Member], index: list[tuple[int, int]] | None, tail: bytes = b"") -> Manifest:
    """A shard of these members. Its index points at each of them, or wherever it is told to."""
    buffer = io.BytesIO()
    entries = []
    for member in members:
        header = tarfile.TarInfo(member.name)
        header.type, header.linkname, header.mode = member.type, member.link, member.mode
        header.size = len(member.data)
        data = header.tobuf(tarfile.GNU_FORMAT if len(member.name) > 99 else tarfile.USTAR_FORMAT)
        if member.name.endswith(".u16"):
            entries.append((buffer.tell() + len(data), len(member.data) // 2))
        buffer.write(data + member.data + b"\0" * (-len(member.data) % 512))
    content = buffer.getvalue() + b"\0" * 1024 + tail
    entries = index if index is not None else entries
    idx = np.array(entries, dtype="<i8").tobytes()
    (directory / "shard-000000.tar").write_bytes(content)
    (directory / "shard-000000.idx").write_bytes(idx)
    info = ShardInfo(
        name="shard-000000.tar",
        bytes=len(content),
        documents=len(entries),
        tokens=sum(length for _, length in entries),
        sha256=hashlib.sha256(content).hexdigest(),
        index_sha256=hashlib.sha256(idx).hexdigest(),
    )
    return Manifest("train", (info,), "0" * 64, 1000, {"unk": 0, "bos": 1, "eos": 2, "pad": 3}, "<u2", str(directory))


GOOD = [Member("0_0.u16", TOKENS.tobytes()), Member("0_0.json", b"{}")]

CORPUS: dict[str, tuple[list[Member], list[tuple[int, int]] | None, bytes]] = {
    "path upwards": ([Member("../../" + CANARY + ".u16", TOKENS.tobytes()), Member("x.json", b"{}")], None, b""),
    "absolute path": ([Member("/tmp/" + CANARY + ".u16", TOKENS.tobytes()), Member("x.json", b"{}")], None, b""),
    "extra path": ([*GOOD, Member("../" + CANARY, b"x")], None, b""),
    "symbolic link": ([*GOOD, Member("link", b"", tarfile.SYMTYPE, "/etc/passwd")], None, b""),
    "hard link": ([*GOOD, Member("link", b"", tarfile.LNKTYPE, "/etc/passwd")], None, b""),
    "link as tokens": ([Member("0_0.u16", b"", tarfile.SYMTYPE, "/etc/passwd"), Member("0_0.json", b"{}")], None, b""),
    "character device": ([*GOOD, Member("null", b"", tarfile.CHRTYPE)], None, b""),
    "block device": ([*GOOD, Member("disk", b"", tarfile.BLKTYPE)], None, b""),
    "fifo": ([*GOOD, Member("fifo", b"", tarfile.FIFOTYPE)], None, b""),
    "directory": ([*GOOD, Member("dir", b"", tarfile.DIRTYPE)], None, b""),
    "set-uid program": ([*GOOD, Member("run.sh", b"#!/bin/sh\nmkdir " + CANARY.encode(), mode=0o4755)], None, b""),
    "pickle member": ([*GOOD, Member("0_1.pyd", pickle.dumps(Bomb()))], None, b""),
    "pickle as provenance": ([GOOD[0], Member("0_0.pickle", pickle.dumps(Bomb()))], None, b""),
    "pipe as a name": ([Member("pipe:mkdir " + CANARY + ".u16", TOKENS.tobytes()), GOOD[1]], None, b""),
    "very long name": ([Member("a" * 300 + ".u16", TOKENS.tobytes()), Member("x.json", b"{}")], None, b""),
    "no provenance": ([GOOD[0]], None, b""),
    "provenance of another": ([GOOD[0], Member("0_1.json", b"{}")], None, b""),
    "provenance no object": ([GOOD[0], Member("0_0.json", b"[1]")], None, b""),
    "provenance too deep": ([GOOD[0], Member("0_0.json", b"[" * 200_000)], None, b""),
    "data after the end": (GOOD, None, b"hidden" + b"\0" * 506),
    "index beyond the end": (GOOD, [(512, 10**6)], b""),
    "index far beyond the end": (GOOD, [(512, 2**62)], b""),
    "index negative": (GOOD, [(-512, 20)], b""),
    "index negative length": (GOOD, [(512, -5)], b""),
    "index into a header": (GOOD, [(0, 20)], b""),
    "index unaligned": (GOOD, [(514, 19)], b""),
    "index too long": (GOOD, [(512, 21)], b""),
    "index twice": (GOOD, [(512, 20), (512, 20)], b""),
    "another mode": ([Member("0_0.u16", TOKENS.tobytes(), mode=0o755), GOOD[1]], None, b""),
    "key with a slash": ([Member("a/0.u16", TOKENS.tobytes()), Member("a/0.json", b"{}")], None, b""),
    "two dots": ([Member("0_0.x.u16", TOKENS.tobytes()), Member("0_0.x.json", b"{}")], None, b""),
    "no key": ([Member(".u16", TOKENS.tobytes()), Member(".json", b"{}")], None, b""),
    "other extension": ([Member("0_0.u32", TOKENS.tobytes()), GOOD[1]], [(512, 20)], b""),
    "a gap": (
        [GOOD[0], GOOD[1], Member("0_1.txt", b"x"), Member("0_2.u16", TOKENS.tobytes()), Member("0_2.json", b"{}")],
        None,
        b"",
    ),
    "token outside the vocabulary": ([Member("0_0.u16", b"\xff" * 40), GOOD[1]], None, b""),
}


OPENED = ("provenance no object", "provenance too deep", "token outside the vocabulary")
"""What streaming opens although `verify` refuses it: the structure is sound, and what is wrong is found when it is read."""


@pytest.fixture
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "deep")
    return tmp_path


def test_the_good_one_of_the_corpus_is_accepted(tmp_path: Path) -> None:
    manifest = build(tmp_path, GOOD, None)
    assert verify(manifest).problems == []
    assert np.array_equal(TokenStream(manifest, 10).window(0), np.arange(10, 21))


@pytest.mark.parametrize("name", CORPUS)
def test_hostile_shards_are_refused_and_do_nothing(in_empty_directory: Path, name: str) -> None:
    members, index, tail = CORPUS[name]
    data = in_empty_directory / "data"
    data.mkdir()
    manifest = build(data, members, index, tail)
    before = sorted(in_empty_directory.rglob("*"))
    report = verify(manifest)
    assert len(report.problems) == 1 and report.documents == 0, report
    if name not in OPENED:
        for opened in (
            lambda: ShardReader(data / "shard-000000.tar", manifest.shards[0], np.dtype("<u2")),
            lambda: TokenStream(manifest, 5).sample(0),
        ):
            with pytest.raises((CorruptShardError, SamplingError)):  # the latter: too few tokens for a sample
                opened()
    elif name == "token outside the vocabulary":
        with pytest.raises(TokenRangeError):
            TokenStream(manifest, 5).sample(0)
    else:  # what a document's provenance says is ignored until it is asked for
        stream = TokenStream(manifest, 5)
        assert set(stream.sample(0).tolist()) <= {*TOKENS.tolist(), manifest.eos_id}
        with pytest.raises(ShardError, match="no provenance"):
            stream.provenance(stream.documents(0)[0])
    assert sorted(in_empty_directory.rglob("*")) == before
    assert not os.path.exists(f"/tmp/{CANARY}.u16")


def test_a_tar_that_is_a_link_or_nothing_at_all_is_refused(tmp_path: Path) -> None:
    manifest = build(tmp_path, GOOD, None)
    for content in (b"", b"x" * manifest.shards[0].bytes, b"\0" * manifest.shards[0].bytes):
        (tmp_path / "shard-000000.tar").write_bytes(content)
        assert len(verify(manifest).problems) == 1
