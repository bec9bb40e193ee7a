"""A disk that takes no more: the kernel refuses every write in this process, as on a full disk."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest
import torch

from hope_megatron.cli import main as cli
from hope_megatron.runtime.disks import best_effort, disk_error
from hope_megatron.runtime.files import write_text
from hope_megatron.runtime.records import append_record, read_records
from hope_megatron.testing.disks import full_disk
from hope_megatron.training.ledger import RunLedger
from hope_megatron.training.metrics import MetricsFile, read_metrics
from hope_megatron.training.progress import Progress, configure_logging
from launch.attempts import CRASHED, History


def test_metrics_wait_in_memory_and_come_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(1, {"train/loss": 1.0})
    with full_disk(limit=60):  # in the middle of a line
        for step in (2, 3):
            file.append(step, {"train/loss": 1.0 / step})
    assert [record["step"] for record in read_metrics(file.path)] == [1], "no half line"
    file.append(4, {"train/loss": 0.25})
    assert [record["step"] for record in read_metrics(file.path)] == [1, 2, 3, 4]
    assert sum("cannot be written" in message for message in caplog.messages) == 1


def test_ledger_and_attempts_wait_too(tmp_path: Path) -> None:
    ledger, history = RunLedger(tmp_path / "ledger.jsonl"), History(tmp_path / "attempts.jsonl")
    with full_disk():
        assert not ledger.record("skipped step", 3, 8, 4)
        history.start("7", 0, ["n"], 0)
        history.end(CRASHED, "why", 0)
    assert not read_records(ledger.path).records
    assert ledger.flush()
    history.submitted()
    assert [entry["step"] for entry in RunLedger(ledger.path).entries] == [3]
    assert len(History(history.path).attempts) == 1


def test_a_log_on_a_full_disk_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(0, tmp_path / "train.log", Progress(1, 1))
    with full_disk():
        logging.getLogger("hope_megatron.x").warning("said anyway")
    assert "said anyway" in capsys.readouterr().err
    for handler in list(logging.getLogger("hope_megatron").handlers):
        logging.getLogger("hope_megatron").removeHandler(handler)


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write_text(path, "new content")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with full_disk(), pytest.raises(OSError, match="File too large"):
        append_record(tmp_path / "r", {"a": 1})
    assert read_records(tmp_path / "r") == ([], [])


def test_libraries_that_hide_the_error_are_understood(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with full_disk(4096):
        for save in (torch.save, lambda tensors, path: save_file(tensors, path)):
            with pytest.raises(Exception) as raised:
                save({"a": torch.zeros(10_000)}, tmp_path / "x")
            assert disk_error(raised.value), raised.value
    assert disk_error(ValueError("a bug")) is None
    with pytest.raises(ValueError, match="a bug"), best_effort("x"):
        raise ValueError("a bug")


def test_a_command_on_a_full_disk_says_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: list[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "out/x")

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert cli.main(["plan"]) == 2
    assert (
        capsys.readouterr().err == "error: out/x: No space left on device; make room, then run the same command again\n"
    )


def test_an_export_on_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    from hope_megatron.checkpoint.errors import ConversionError
    from hope_megatron.checkpoint.output import fresh_directory

    with (
        full_disk(1000),
        pytest.raises(ConversionError, match=r"cannot write .*model"),
        fresh_directory(tmp_path / "model") as directory,
    ):
        (directory / "weights").write_bytes(b"0" * 5000)
    assert list(tmp_path.iterdir()) == []
