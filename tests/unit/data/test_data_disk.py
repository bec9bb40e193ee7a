"""Full, read-only and unwritable disks: one line, nothing half left, and the same command goes on where it stopped."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.cache import ShardCache
from data_pipeline.cli import main
from data_pipeline.errors import OutputError
from data_pipeline.ledger import Ledger
from data_pipeline.manifest import Manifest
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import Tokenizer

from .test_data_prepare import LINES, digests


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this process may not mount a file system: {done.stderr.strip()}")

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)

    def unmount(self) -> None:
        gc.collect()  # shards that a test mapped into memory keep the file system busy
        subprocess.run(["umount", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk")
    disk.mount("size=8m")
    yield disk
    disk.unmount()


def one_line(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The message of a command that must fail for what the disk does."""
    assert main([*map(str, argv)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def no_manifest_without_its_shards(directory: Path) -> None:
    for path in directory.rglob("manifest.json"):
        manifest = Manifest.load(path)
        assert all(Path(manifest.path(info.name)).stat().st_size == info.bytes for info in manifest.shards)


def test_prepare_on_a_disk_that_fills_at_any_point(
    disk: Disk,
    tmp_path: Path,
    write_corpus: Callable[..., Path],
    tokenizer: Tokenizer,
    make_texts: Callable[..., list[str]],
) -> None:
    corpus = write_corpus(make_texts(150), per_file=50)
    options = {
        "held_out_fraction": 0.2,
        "shard_tokens": 2000,
        "read": LINES,
        "near_duplicates": 0.95,
        "commit_seconds": 0.0,
    }
    prepare([corpus], tokenizer, tmp_path / "whole", **options)  # type: ignore[arg-type]
    whole, failures, size = digests(tmp_path / "whole"), 0, 0
    while digests(disk.path / "out") != whole:
        size += 16  # KiB more at each attempt, so that it stops at another place
        disk.remount(f"size={size}k")
        try:
            prepare([corpus], tokenizer, disk.path / "out", **options)  # type: ignore[arg-type]
        except OutputError as error:
            failures += 1
            assert "The disk is full: free some space" in str(error)
        no_manifest_without_its_shards(disk.path)
    assert failures > 10


def test_merge_on_a_disk_that_fills_at_any_point(
    disk: Disk, tmp_path: Path, write_corpus: Callable[..., Path], tokenizer_path: Path, make_texts: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    texts = make_texts(90)
    corpus = write_corpus(
        [*texts[:45], *texts[10:]], per_file=45
    )  # the slices share documents, so shards are written anew
    argv = ["prepare", str(corpus), "--tokenizer", str(tokenizer_path), "--text-unit", "line", "--held-out", "0.2"]
    for out in (tmp_path / "whole", disk.path / "out"):
        assert (
            main([*argv, "--out", str(out), "--slice", "0/2"])
            == main([*argv, "--out", str(out), "--slice", "1/2"])
            == 0
        )
    assert main(["merge", str(tmp_path / "whole")]) == 0
    whole, failures = digests(tmp_path / "whole"), 0
    size = sum(path.stat().st_blocks for path in disk.path.rglob("*")) // 2
    while digests(disk.path / "out") != whole:
        size += 8
        disk.remount(f"size={size}k")
        if main(["merge", str(disk.path / "out")]):
            failures += 1
            assert "The disk is full" in capsys.readouterr().err
        no_manifest_without_its_shards(disk.path / "out")
    assert failures > 3


@pytest.mark.parametrize("state", ["full", "read-only"])
def test_every_writer_says_it_in_one_line(
    disk: Disk, tmp_path: Path, dataset: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str], state: str
) -> None:
    shutil.copytree(dataset, disk.path / "data")
    (tmp_path / "text.txt").write_text("some text to train on, of many words\n" * 50)
    if state == "read-only":
        disk.remount("ro")
    else:
        with open(disk.path / "filler", "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(b"\0" * 4096)
    before = sorted(disk.path.rglob("*"))
    words = "The disk is full" if state == "full" else "Choose a directory that you may write to"
    text, tokenizer = tmp_path / "text.txt", ["--tokenizer", tokenizer_path]
    for argv in (
        ["tokenizer", text, "--vocab-size", "300", "--out", disk.path / "t.model"],
        ["tokenizer", "--existing", tokenizer_path, "--out", disk.path / "t.model"],
        ["prepare", text, *tokenizer, "--out", disk.path / "new", "--held-out", "0"],
        ["prepare", text, *tokenizer, "--out", disk.path / "data", "--held-out", "0", "--overwrite"],
        ["drop", disk.path / "data/train", "shard-000001.tar", "--out", "smaller.json"],
        ["stats", dataset, "--png", disk.path / "lengths.png"],
    ):
        if state == "full" and "--overwrite" in argv:
            continue  # that frees the space first
        assert words in one_line(capsys, *argv), argv
    with pytest.raises(OutputError, match=words):
        Ledger(disk.path / "ledger.jsonl").record_corrupt("a.tar", "here", "0", reason="")
    left = [path for path in sorted(disk.path.rglob("*")) if path not in before]
    # empty directories, locks and the first bytes of what goes on when the command is run again
    assert all(path.is_dir() or path.name in (".lock", "ledger.jsonl") or path.stat().st_size == 0 for path in left), (
        left
    )
    if state == "full":
        (disk.path / "filler").unlink()
        argv = ["prepare", text, *tokenizer, "--out", disk.path / "new", "--held-out", "0"]
        assert main([*map(str, argv)]) == 0


def test_a_full_cache_disk_is_no_failure_of_the_store(disk: Disk, manifest: Manifest) -> None:
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    memory = fsspec.filesystem("memory")
    for path in Path(manifest.location).iterdir():
        memory.pipe(f"/disk-test/{path.name}", path.read_bytes())
    try:
        remote = Manifest.load("memory://disk-test")
        disk.remount("size=16k")
        cache = ShardCache(disk.path / "cache", attempts=1)
        with pytest.raises(OutputError, match="The disk is full"):
            for info in remote.shards:
                cache.fetch(remote, info)
        assert not list(disk.path.rglob("*.tmp")) and not list(disk.path.rglob(".reserved"))
        disk.remount("size=8m")
        assert all(cache.fetch(remote, info).stat().st_size == info.bytes for info in remote.shards)
    finally:
        memory.rm("/disk-test", recursive=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("command", [["stats"], ["decode", "--document", "1"], ["inspect", "--count", "200", "--json"]])
def test_output_that_cannot_be_written_is_said(dataset: Path, command: list[str]) -> None:
    argv = [sys.executable, "-m", "data_pipeline.cli", command[0], str(dataset / "train"), *command[1:]]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            argv, stdout=full, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
        )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot write standard output: No space left on device" in done.stderr


def test_names_that_are_too_long_and_files_in_the_way(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "file").write_text("")
    argv = ["prepare", tmp_path / "text.txt", "--tokenizer", tokenizer_path, "--held-out", "0", "--out"]
    assert "File name too long" in one_line(capsys, *argv, tmp_path / ("x" * 300))
    assert "collide" in one_line(capsys, *argv, tmp_path / "file" / "out")


def test_tokens_survive_what_interrupted_them(disk: Disk, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """After a failure in the middle of a document nothing of it stays."""
    from data_pipeline.shards import ShardReader, ShardWriter

    disk.remount("size=64k")
    writer = ShardWriter(disk.path, np.dtype("<u2"), 1 << 30)
    writer.add(np.arange(100, dtype="<u2"), {"n": 0})
    state = writer.commit()
    with pytest.raises(OutputError):
        while True:
            writer.add(np.arange(1000, dtype="<u2"), {"n": 1})
            writer.commit()
    writer.close()
    disk.remount("size=8m")
    again = ShardWriter(disk.path, np.dtype("<u2"), 1 << 30, state)
    again.add(np.arange(7, dtype="<u2"), {"n": 2})
    (info,) = again.finish()
    reader = ShardReader(disk.path / info.name, info, np.dtype("<u2"))
    assert [(len(tokens), where) for tokens, where in reader.documents()] == [(100, {"n": 0}), (7, {"n": 2})]
