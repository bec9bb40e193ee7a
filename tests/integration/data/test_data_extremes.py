"""Inputs of a size or shape that must not matter: bounded memory, counted, never a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.tokenizer import train_tokenizer

MEMORY_LIMIT = 400 << 20  # bytes of private memory; the interpreter with numpy and SentencePiece takes about 60 MiB

SCRIPT = """
import json, sys
from data_pipeline.corpus import ReadOptions
from data_pipeline.prepare import prepare

report = prepare(
    [sys.argv[1]], sys.argv[2], sys.argv[3], held_out_fraction=0.0, workers=1,
    read=ReadOptions(text_unit="line"), shard_tokens=1 << 20,
)
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
print(json.dumps({"documents_in": report.documents_in, "out": report.documents_out, "rejected": report.rejected,
                  "peak": peak}))
"""


def prepare_apart(source: Path, tmp_path: Path) -> dict:
    train_tokenizer(["some text to train on, of many words"] * 10, tmp_path / "t.model", 285)
    arguments = [sys.executable, "-c", SCRIPT, str(source), str(tmp_path / "t.model"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def write_long_line(path: Path, mebibytes: int) -> None:
    with open(path, "wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(mebibytes):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "after"}\n')


def check_long_line(tmp_path: Path, mebibytes: int) -> None:
    write_long_line(tmp_path / "long.jsonl", mebibytes)
    result = prepare_apart(tmp_path / "long.jsonl", tmp_path)
    assert result["documents_in"] == 3 and result["out"] == 2 and result["rejected"] == {"too_long": 1}
    assert result["peak"] < MEMORY_LIMIT


def check_empty_documents(tmp_path: Path, count: int) -> None:
    with open(tmp_path / "empty.jsonl", "w") as file:
        for i in range(count):
            file.write('{"text": ""}\n' if i % 2 else "\n")
        file.write('{"text": "the only one"}\n')
    result = prepare_apart(tmp_path / "empty.jsonl", tmp_path)
    assert result["documents_in"] == count + 1 and result["out"] == 1 and result["rejected"] == {"empty": count}
    assert result["peak"] < MEMORY_LIMIT


def test_long_line_and_many_empty_documents(tmp_path: Path) -> None:
    check_long_line(tmp_path, mebibytes=48)
    (tmp_path / "second").mkdir()
    check_empty_documents(tmp_path / "second", count=20_000)


@pytest.mark.slow
def test_line_of_one_gibibyte(tmp_path: Path) -> None:
    check_long_line(tmp_path, mebibytes=1024)


@pytest.mark.slow
def test_million_empty_documents(tmp_path: Path) -> None:
    check_empty_documents(tmp_path, count=1_000_000)


def test_random_bytes_are_counted_and_never_crash(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for suffix in ("txt", "jsonl", "txt.gz", "jsonl.gz", "parquet"):
        for number in range(5):
            (tmp_path / "in" / f"{number}.{suffix}").write_bytes(os.urandom(5000))
    (tmp_path / "in" / "good.txt").write_text("one good line\n")
    result = prepare_apart(tmp_path / "in", tmp_path)
    assert result["documents_in"] == result["out"] + sum(result["rejected"].values())
    assert result["out"] >= 1 and result["rejected"]["unreadable"] >= 10
