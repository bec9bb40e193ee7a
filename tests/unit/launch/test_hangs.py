"""Whom a hang is put down to, and what a watchdog sees of a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hope_megatron.runtime.heartbeat import Heartbeat, Limits, beat_file, read_beat, read_beats
from launch.hangs import diagnose, keep_reports, read_hang
from launch.watchdog import Watchdog, collect_stacks, own, process_state, remove_abandoned


def rank(number: int, entered: int = 9, collectives: int = 40, *, waiting: bool = True, state: str = "S") -> dict:
    return {
        "rank": number, "node": f"node{number // 2}", "state": state, "step": 7, "phase": "backward", "since_s": 31.0,
        "position": [entered, collectives], "collective": "allreduce", "in_collective_s": 30.0 if waiting else None, "stack": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "who", "words"),
    [
        ([rank(0), rank(1), rank(2, state="T"), rank(3)], 2, "stopped by a signal"),
        ([rank(0), rank(1), rank(2, state="D", waiting=False), rank(3)], 2, "waiting for a disk"),
        (
            [rank(0), rank(1, entered=8), rank(2), rank(3)],
            1,
            "behind the others, in allreduce (collective 40) of phase backward",
        ),
        ([rank(0), rank(1), rank(2), rank(3, waiting=False)], 3, "outside of the collective that the others wait in"),
        ([rank(0, collectives=39), rank(1)], 0, "behind the others"),
        ([rank(0), rank(1)], None, "none is behind"),
        ([rank(0, waiting=False)], 0, "in phase backward"),
    ],
)
def test_the_rank_behind_is_named(ranks: list, who: int | None, words: str) -> None:
    hang = diagnose(ranks)
    assert hang.rank == who and words in hang.text
    assert (hang.node, hang.step) == (f"node{(who or 0) // 2}", 7)


def test_heartbeats_are_read_by_others(tmp_path: Path) -> None:
    heart = Heartbeat()
    heart.limits = Limits(min_s=30, step_factor=5, first_step_s=600)
    heart.attach(tmp_path, 3)
    heart.begin_step(1)
    heart.enter("forward")
    beat = read_beat(beat_file(tmp_path, 3))
    assert (beat.rank, beat.step, beat.phase, beat.pid, beat.limit_s) == (3, 1, "forward", os.getpid(), 600)
    heart.end_step()
    for step in range(2, 6):
        heart.begin_step(step)
        heart._step_began -= 10.0  # a step of ten seconds
        heart.end_step()
    heart.enter("backward")
    heart.begin_collective("allreduce")
    with heart.waiting():
        (beat,) = read_beats(tmp_path)
        assert beat.collective == "allreduce" and beat.collective_since > 0
    (beat,) = read_beats(tmp_path)
    assert beat.limit_s == pytest.approx(50, abs=1) and beat.position == (3, 1) and beat.collective_since == 0
    assert beat.overdue_s(beat.since + 51) > 0 > beat.overdue_s(beat.since + 49)


RANK = """
import sys, time
from pathlib import Path
from hope_megatron.runtime.heartbeat import HEART, Limits
HEART.limits = Limits(min_s=1.0, first_step_s=1.0, start_up_s=30.0)
HEART.attach(Path(sys.argv[1]), int(sys.argv[2]))
for step in range(1, 10**6):
    HEART.begin_step(step); HEART.enter("forward"); time.sleep(0.02); HEART.end_step()
"""


def test_a_watchdog_finds_a_stopped_process_and_keeps_its_stack(tmp_path: Path) -> None:
    beats, reports = tmp_path / "beats", tmp_path / "reports"
    beats.mkdir()
    reports.mkdir()
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(beats), str(number)]) for number in range(2)]
    watchdog = subprocess.Popen(
        [sys.executable, "-m", "launch.watchdog", str(beats), str(reports), "here", "2", "1", "30"]
    )
    try:
        deadline = time.monotonic() + 60
        while len(read_beats(beats)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.5)
        assert watchdog.poll() is None and all(process.poll() is None for process in ranks), "nothing hangs"
        os.kill(ranks[1].pid, signal.SIGSTOP)
        assert [process.wait(30) for process in ranks] == [-signal.SIGKILL] * 2
        watchdog.wait(30)
    finally:
        for process in [*ranks, watchdog]:
            process.kill()
    hang = read_hang(reports)
    assert hang is not None and hang.rank == 1 and "stopped by a signal, in phase forward" in hang.text
    keep_reports(reports, tmp_path / "kept")
    assert "most recent call first" in (tmp_path / "kept" / "stack-rank-00001.txt").read_text()


STOPS_ITSELF = """
import os, signal, sys, threading, time
from pathlib import Path
from hope_megatron.runtime.heartbeat import HEART
HEART.attach(Path(sys.argv[1]), 0)
def be_awake():
    while True:
        time.sleep(0.0005)
for _ in range(24):
    threading.Thread(target=be_awake, daemon=True).start()
def it_stood_here():
    os.kill(os.getpid(), signal.SIGSTOP)
while True:
    it_stood_here()
    time.sleep(0.05)
"""


def test_the_stack_of_a_stopped_process_is_of_where_it_stood(tmp_path: Path) -> None:
    """Not of where it goes on to, whichever of its threads wakes first."""
    process = subprocess.Popen([sys.executable, "-c", STOPS_ITSELF, str(tmp_path)])
    try:
        for _ in range(10):
            deadline = time.monotonic() + 30
            while process_state(process.pid) != "T" and time.monotonic() < deadline:
                time.sleep(0.01)
            stack = collect_stacks(tmp_path, read_beats(tmp_path))[0]
            assert "it_stood_here" in stack.rpartition("most recent call first")[2]
    finally:
        process.kill()


def test_ranks_that_never_come_up_are_reported(tmp_path: Path) -> None:
    (tmp_path / "beats").mkdir()
    assert Watchdog(tmp_path / "beats", tmp_path, "node9", ranks=2, nodes=1, start_limit_s=0.2).run() == 1
    hang = read_hang(tmp_path)
    assert hang is not None and hang.text == "ranks on node9 did not come up within their limit"


def test_a_watchdog_removes_what_killed_attempts_left_and_nothing_else(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"hope-{name}" for name in ("own", "killed", "running", "ranks-live", "starting")}
    for path in [*paths.values(), tmp_path / "other"]:
        path.mkdir()
    owners = {name: own(paths[name]) for name in ("killed", "running", "ranks-live")}
    (tmp_path / "hope-link").symlink_to(paths["running"])
    Heartbeat().attach(paths["ranks-live"], 0)
    for name in ("killed", "ranks-live"):
        os.close(owners[name])  # as the kernel does when the watchdog dies
    assert remove_abandoned(paths["own"]) == [paths["killed"]]
    os.close(owners["running"])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"hope-own", "hope-running", "hope-ranks-live", "hope-starting", "other", "hope-link"}
