"""A writer waits for a healthy disk, goes on without one that hangs, and loses nothing of either's order."""

from __future__ import annotations

import threading

import pytest

from hope_megatron.runtime import patience
from hope_megatron.runtime.patience import PatientWriter


def test_a_write_that_hangs_is_waited_for_once_and_all_come_in_order(caplog: pytest.LogCaptureFixture) -> None:
    disk, written = threading.Event(), []
    write = PatientWriter("metrics.jsonl", patience_s=0.05)
    assert write(lambda: written.append(0)) and written == [0], "done when the call returns"
    assert not write(lambda: disk.wait() and written.append(1))
    write.patience_s = 1000.0  # would be noticed
    assert not any(write(lambda number=number: written.append(number)) for number in (2, 3))
    assert written == [0]
    disk.set()
    assert write.flush(10.0) and written == [0, 1, 2, 3]
    assert write(lambda: written.append(4)) and written[-1] == 4
    assert [message.partition(" ")[2][:20] for message in caplog.messages] == [
        "cannot be written: t",
        "is written again",
    ]


def test_writes_that_are_dropped_are_counted(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "MAX_WAITING", 2)
    disk, written = threading.Event(), []
    write = PatientWriter("metrics.jsonl", patience_s=0.05)
    for number in range(6):  # the thread has taken the first one
        write(lambda number=number: disk.wait() and written.append(number))
    disk.set()
    assert write.flush(10.0) and written == [0, 1, 2]
    assert write(lambda: written.append(6)) and written[-1] == 6
    assert caplog.messages[-1] == "metrics.jsonl is written again; 3 writes were dropped"


def test_what_a_write_raises_reaches_the_caller() -> None:
    def fail() -> None:
        raise ValueError("a bug")

    write = PatientWriter(None)
    with pytest.raises(ValueError, match="a bug"):
        write(fail)
    assert write(lambda: None)
