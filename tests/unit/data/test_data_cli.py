from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from data_pipeline.cli import byte_size, main, register, slice_of
from data_pipeline.manifest import Manifest
from data_pipeline.open_tokenizer import load_tokenizer
from data_pipeline.stream import TokenStream
from data_pipeline.tokenizer import Tokenizer

COMMANDS = ("tokenizer", "prepare", "merge", "verify", "inspect", "stats", "decode", "drop")


def run_json(capsys: pytest.CaptureFixture[str], *argv: object) -> dict:
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"hope data {command}" in capsys.readouterr().out


def test_parsing_imports_nothing_heavy() -> None:
    code = (
        "import sys; import data_pipeline, data_pipeline.cli\n"
        "try: data_pipeline.cli.main(['prepare', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'torch', 'sentencepiece', 'webdataset', 'fsspec', 'rich', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_using_the_package_never_imports_torch(dataset: Path) -> None:
    code = (
        "import sys; from data_pipeline import TokenStream, MixtureStream\n"
        "import data_pipeline.commands, data_pipeline.cache\n"
        f"TokenStream({str(dataset / 'train')!r}, 16).sample(0)\n"
        "assert not {'torch', 'hope_megatron', 'webdataset', 'pyarrow', 'fsspec'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registers_under_another_command_line() -> None:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    arguments = parser.parse_args(["data", "stats", "somewhere"])
    assert callable(arguments.func) and arguments.path == "somewhere"


def test_the_whole_road(tmp_path: Path, capsys: pytest.CaptureFixture[str], write_corpus: Callable[..., Path],
                        make_texts: Callable[..., list[str]]) -> None:  # fmt: skip
    corpus, model, out = write_corpus(make_texts(60)), tmp_path / "t.model", tmp_path / "out"
    made = run_json(capsys, "tokenizer", corpus, "--vocab-size", 320, "--out", model)
    assert made["vocab_size"] == 320 and made["exact_round_trip"]
    report = run_json(
        capsys, "prepare", corpus, "--tokenizer", model, "--out", out, "--text-unit", "line", "--held-out", "0.2",
        "--shard-tokens", "900",
    )  # fmt: skip
    assert report["documents_in"] == 60 == sum(report["documents"].values())
    verified = run_json(capsys, "verify", out, "--text")
    assert all(result["problems"] == [] for result in verified.values())
    stats = run_json(capsys, "stats", out, "--png", tmp_path / "lengths.png")
    assert stats["train"]["tokens"] == report["tokens"]["train"]
    assert sum(row[2] for row in stats["train"]["histogram"]) == report["documents"]["train"]
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    shown = run_json(capsys, "inspect", out / "train", "--document", 3, "--count", 2, "--chars", 0)
    assert [entry["number"] for entry in shown] == [3, 4]
    assert main(["decode", str(out / "train"), "--document", "3"]) == 0
    assert capsys.readouterr().out == shown[0]["text"]
    sample = run_json(capsys, "decode", out / "train", "--document", 5)
    decoded = run_json(capsys, "decode", "--tokenizer", model, "--ids", *sample["tokens"])
    assert decoded["text"] == sample["text"] == load_tokenizer(model).decode(sample["tokens"])


def test_plain_output_of_every_report(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, expected in (
        (["verify", dataset], "shards are whole"),
        (["stats", dataset], "tokens per document"),
        (["inspect", dataset], "--- document 0: "),
    ):
        assert main([*map(str, argv)]) == 0
        assert expected in capsys.readouterr().out


def test_slices_and_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer_path: Path,
                          write_corpus: Callable[..., Path], make_texts: Callable[..., list[str]]) -> None:  # fmt: skip
    corpus = write_corpus(make_texts(60), per_file=10)
    for i in range(2):
        assert main([
            "prepare", str(corpus), "--tokenizer", str(tokenizer_path), "--out", str(tmp_path / "out"),
            "--text-unit", "line", "--held-out", "0.2", "--slice", f"{i}/2",
        ]) == 0  # fmt: skip
    capsys.readouterr()
    assert run_json(capsys, "merge", tmp_path / "out")["documents_in"] == 60


def test_existing_model_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: Tokenizer,
                                 tokenizer_path: Path) -> None:  # fmt: skip
    made = run_json(capsys, "tokenizer", "--existing", tokenizer_path, "--out", tmp_path / "copy.model")
    assert made["sha256"] == tokenizer.digest == load_tokenizer(tmp_path / "copy.model").digest


def test_verify_finds_the_bad_shard(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.copytree(dataset, tmp_path / "data")
    path = tmp_path / "data" / "train" / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    assert main(["verify", str(tmp_path / "data")]) == 1
    assert "shard-000001.tar has changed" in capsys.readouterr().out
    with tarfile.open(path) as tar:  # still a readable tar: only the digest tells
        assert tar.getnames()


def test_drop_writes_a_smaller_manifest(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.copytree(dataset / "train", tmp_path / "train")
    made = run_json(capsys, "drop", tmp_path / "train", "shard-000001.tar", "--out", "smaller.json")
    before, after = Manifest.load(tmp_path / "train"), Manifest.load(made["manifest"])
    assert {shard.name for shard in before.shards} - {shard.name for shard in after.shards} == {"shard-000001.tar"}
    TokenStream(after, 16).sample(0)
    for argv in (["nope.tar", "--out", "x.json"], ["shard-000001.tar", "--out", "smaller.json"],
                 ["shard-000001.tar", "--out", "../x.json"]):  # fmt: skip
        assert main(["drop", str(tmp_path / "train"), *argv]) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tokenizer", "--out", "x"], "--existing"),
        (["prepare", "/nope", "--tokenizer", "/nope.model", "--out", "x"], "does not exist"),
        (["prepare", "python-stdlib", "--tokenizer", "/nope.model", "--out", "x"], "cannot read the tokenizer"),
        (["merge", "/nope"], "does not exist"),
        (["verify", "/nope"], "hope data prepare"),
        (["decode", "--ids", "1"], "--tokenizer"),
        (["decode", "--document", "1"], "name the prepared split"),
        (["inspect", "/nope", "--step", "1"], "training run"),
        (["decode", "/nope", "--sample", "1"], "training run"),
    ],
)
def test_mistakes_get_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_sizes_and_slices_are_parsed() -> None:
    assert [byte_size(text) for text in ("12", "1K", "1.5M", "2GiB", "1tb")] == [12, 1024, 3 << 19, 2 << 30, 1 << 40]
    assert slice_of("3/16") == (3, 16)
    for parse, text in ((byte_size, "much"), (byte_size, "inf"), (slice_of, "3"), (slice_of, "a/b")):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


def test_ctrl_c_ends_quietly_and_the_run_continues(
    tmp_path: Path, tokenizer_path: Path, write_corpus: Callable[..., Path], make_texts: Callable[..., list[str]]
) -> None:
    corpus = write_corpus(make_texts(4000, max_words=300), per_file=1000)
    argv = [
        sys.executable, "-m", "data_pipeline.cli", "prepare", str(corpus), "--tokenizer", str(tokenizer_path), "--out",
        str(tmp_path / "out"), "--text-unit", "line", "--shard-tokens", "5000", "--workers", "2",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    # a background job of a shell ignores Ctrl-C, and its children would too
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        argv, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=heard
    )
    while not list((tmp_path / "out").glob("train/*.tar")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and "continues" in errors
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()
    assert main([*argv[3:-1], "1"]) == 0
