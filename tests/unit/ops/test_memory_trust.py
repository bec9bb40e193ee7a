"""What is remembered of self-checks, and who waits for whom. The check itself is of test_memory_triton.py."""

from __future__ import annotations

import fcntl
import logging
import threading
import time

import pytest
import torch

from hope_megatron.ops.memory import MemoryRule
from hope_megatron.ops.memory.backends.installed import BACKENDS
from hope_megatron.ops.memory.backends.phases.scan import PHASES
from hope_megatron.ops.memory.backends.registry import Case, KernelError, choose
from hope_megatron.ops.memory.backends.triton import backend, trust, unchecked
from hope_megatron.ops.memory.backends.triton.backend import TRITON
from hope_megatron.ops.memory.rule import AUTO, MemoryCompute

pytest.importorskip("triton", reason="Triton is not installed")

CASE = Case(MemoryRule(), (True, True, False), 4, 64, 64, torch.float32, "cpu", "fp32", True)
WRONG = {
    "trusted": False,
    "reason": "one key: y is 3.0e-01 off, at most 1.0e-05 is rounding",
    "errors": {"y": [0.3, 1e-5]},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trust._distrust.cache_clear()
    yield tmp_path / "hope_megatron"
    trust._distrust.cache_clear()


class Check:
    """Answers what it is told, and counts."""

    def __init__(self, answer):
        self.answer, self.times = answer, 0

    def __call__(self, case):
        self.times += 1
        if isinstance(self.answer, BaseException):
            raise self.answer
        return dict(self.answer)


def asked_anew(check, case=CASE):
    trust._distrust.cache_clear()  # as another process
    return trust.distrust(case, check)


def test_a_verdict_is_found_once_and_a_damaged_one_again(cache):
    check = Check({"trusted": True})
    assert [asked_anew(check) for _ in range(3)] == [None] * 3 and check.times == 1
    assert asked_anew(check, CASE._replace(streams=99)) is None and check.times == 1
    assert asked_anew(check, CASE._replace(h=32)) is None and check.times == 2
    first, *_ = cache.glob("triton-*.json")
    first.write_text(first.read_text().replace("true", "false", 1))
    asked_anew(check), asked_anew(check, CASE._replace(h=32))
    assert check.times == 3


def test_a_mismatch_turns_the_kernels_off_loudly_and_stays(caplog):
    check = Check(WRONG)
    for _ in range(2):
        with caplog.at_level(logging.ERROR):
            reason = asked_anew(check)
        assert "y is 3.0e-01 off" in reason and "y is 3.0e-01 off" in caplog.records[-1].getMessage()
    assert check.times == 1
    report = reason.split("Report: ")[1].split(" (")[0]
    written = trust._read(trust.Path(report))
    assert written["triton"] and written["kernels"] == trust.source_digest() and written["errors"] == {"y": [0.3, 1e-5]}


def test_processes_that_die_checking_turn_the_kernels_off():
    """As an illegal access to memory does, which no process survives."""
    check = Check(KeyboardInterrupt())
    for times in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            asked_anew(check)
        assert check.times == times
    assert "2 checks ended with their process" in asked_anew(check) and check.times == 2


def test_who_comes_second_waits_and_says_so(cache, caplog):
    cache.mkdir()
    asked_anew(Check({"trusted": True}))
    with open(next(cache.glob("triton-*.lock")), "w") as lock, caplog.at_level(logging.INFO):
        fcntl.flock(lock, fcntl.LOCK_EX)
        check = Check(WRONG)
        waiting = threading.Thread(target=asked_anew, args=(check,))
        waiting.start()
        while not any("waiting since 0 s" in record.getMessage() for record in caplog.records):
            time.sleep(0.01)
        fcntl.flock(lock, fcntl.LOCK_UN)
        waiting.join()
    assert check.times == 0


def test_a_cache_that_cannot_be_written_is_said(cache, caplog):
    cache.write_text("a file where the folder should be")
    assert asked_anew(Check({"trusted": True})) is None
    assert "every process checks them" in caplog.text


def test_the_callers_modes_are_off_while_it_checks():
    found = {}

    def check(case):
        x = torch.ones(1, requires_grad=True)
        found["grad"] = (2 * x).requires_grad
        return {"trusted": True}

    with torch.inference_mode():
        asked_anew(check)
    assert found["grad"]


def test_auto_takes_the_kernels_on_a_gpu_where_they_were_found_right(monkeypatch):
    case = CASE._replace(device="cuda")
    assert choose(case, AUTO, BACKENDS).name == PHASES.name  # there is no CUDA device
    with pytest.raises(KernelError, match="sees no CUDA device"):
        choose(case, MemoryCompute(kernel="triton"), BACKENDS)
    monkeypatch.setattr(unchecked, "_why_not_here", lambda device: None)
    for reason, rule in ((None, MemoryRule(16)), ("the self-check failed", MemoryRule(48))):
        monkeypatch.setattr(backend, "distrust", lambda case, reason=reason: reason)
        expected = TRITON if reason is None else PHASES
        assert choose(case._replace(rule=rule), AUTO, BACKENDS).name == expected.name
    with pytest.raises(KernelError, match="the self-check failed"):
        choose(case._replace(rule=rule), MemoryCompute(kernel="triton"), BACKENDS)
