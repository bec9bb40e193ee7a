"""The watchdog of a node: a process that sees when a rank of its node stops making progress, and ends what hangs.

    python -m launch.watchdog BEATS REPORTS NODE RANKS NODES START_LIMIT

It reads the heartbeats in BEATS (node-local). When one is overdue it writes REPORTS/hang-NODE.json with the place and the
stacks of every rank of the node, waits a moment for the watchdogs of the other nodes, which do the same, and kills the ranks;
the supervisor names the rank that is behind (launch/hangs.py), and starts again. A process, not a thread: neither a lock on the
interpreter nor a stopped process hides from it. It also removes what killed attempts left on the node. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hope_megatron.runtime.files import write_json
from hope_megatron.runtime.heartbeat import STACKS_SIGNAL, Beat, read_beats, stack_file

POLL_S = 0.5
HANG_PREFIX = "hang-"
OWNER_FILE = "owner"
"""In a directory of heartbeats; its watchdog holds a lock on it as long as it lives."""
_ASLEEP_S = 5.0
"""A gap in our own time so long means that the machine stood still, not the ranks."""
_STACKS_S = 3.0
_OTHER_NODES_S = 15.0
_PY_SPY_S = 10.0


class Watchdog:
    """Watches the ranks of one node until they are gone.

    Args:
        beats: directory of their heartbeats.
        reports: shared directory for the report.
        node: name of this node.
        ranks: how many there are on it.
        nodes: how many nodes the run has.
        start_limit_s: how long a rank may take until its heart beats.
    """

    def __init__(self, beats: Path, reports: Path, node: str, ranks: int, nodes: int, start_limit_s: float) -> None:
        self.beats, self.reports, self.node = beats, reports, node
        self.ranks, self.nodes, self.start_limit_s = ranks, nodes, start_limit_s
        self._began = self._looked = time.monotonic()
        self._awake_since = 0.0
        self._owner = os.getppid()

    def run(self) -> int:
        """Watch. Returns 0 when the ranks have gone, 1 after a hang."""
        while True:
            now = time.monotonic()
            if now - self._looked - POLL_S > _ASLEEP_S:
                self._awake_since = now
            self._looked = now
            found = read_beats(self.beats)
            if self._are_gone(found):
                shutil.rmtree(self.beats, ignore_errors=True)
                return 0
            if self._overdue(found, now) or self._another_node_hangs():
                self._end(found)
                return 1
            time.sleep(POLL_S)

    def _overdue(self, beats: list[Beat], now: float) -> bool:
        """Whether a rank is late; time before this process last slept does not count, for the ranks slept too."""
        if len(beats) < self.ranks and now - max(self._began, self._awake_since) > self.start_limit_s:
            return True
        return any(is_alive(beat.pid) and now - max(beat.since, self._awake_since) > beat.limit_s for beat in beats)

    def _another_node_hangs(self) -> bool:
        return self.nodes > 1 and any(self.reports.glob(f"{HANG_PREFIX}*.json"))

    def _are_gone(self, beats: list[Beat]) -> bool:
        if len(beats) == self.ranks:
            return not any(is_alive(beat.pid) for beat in beats)
        return os.getppid() != self._owner  # whoever started us died before all hearts beat

    def _end(self, beats: list[Beat]) -> None:
        """Report, wait for the other nodes, kill."""
        now = time.monotonic()
        states = {beat.rank: process_state(beat.pid) for beat in beats}
        ask_for_nccl_traces()
        stacks = {beat.rank: "" for beat in beats} | collect_stacks(self.beats, beats)
        ranks = [describe(beat, states[beat.rank], stacks[beat.rank], now) for beat in beats]
        report = {"node": self.node, "time": time.time(), "missing": self.ranks - len(beats), "ranks": ranks}
        with contextlib.suppress(OSError):
            write_json(self.reports / f"{HANG_PREFIX}{self.node}.json", report)
        deadline = time.monotonic() + _OTHER_NODES_S
        while self.nodes > 1 and len(list(self.reports.glob(f"{HANG_PREFIX}*.json"))) < self.nodes:
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        for beat in beats:
            if is_alive(beat.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beat.pid, signal.SIGKILL)


def describe(beat: Beat, state: str, stack: str, now: float) -> dict[str, Any]:
    """A rank in a report of a hang."""
    return {
        "rank": beat.rank,
        "pid": beat.pid,
        "state": state,
        "step": beat.step,
        "phase": beat.phase,
        "since_s": round(now - beat.since, 1),
        "limit_s": round(beat.limit_s, 1),
        "position": list(beat.position),
        "collective": beat.collective,
        "in_collective_s": round(now - beat.collective_since, 1) if beat.collective_since else None,
        "stack": stack,
    }


def collect_stacks(directory: Path, beats: list[Beat]) -> dict[int, str]:
    """The stacks of all ranks: by faulthandler in the rank itself, and by py-spy where that is installed."""
    before = {beat.rank: _size(stack_file(directory, beat.rank)) for beat in beats}
    for beat in beats:
        with contextlib.suppress(ProcessLookupError):
            signal_main_thread(beat.pid, STACKS_SIGNAL)
            os.kill(beat.pid, signal.SIGCONT)  # a stopped process writes nothing
    deadline = time.monotonic() + _STACKS_S
    while time.monotonic() < deadline and any(
        _size(stack_file(directory, beat.rank)) == before[beat.rank] for beat in beats if is_alive(beat.pid)
    ):
        time.sleep(0.05)
    time.sleep(0.1)  # the last lines
    stacks = {}
    for beat in beats:
        with contextlib.suppress(OSError):
            stacks[beat.rank] = (
                stack_file(directory, beat.rank).read_bytes()[before[beat.rank] :].decode(errors="replace")
            )
    if shutil.which("py-spy"):
        for beat in beats:
            stacks[beat.rank] = stacks.get(beat.rank, "") + _py_spy(beat.pid)
    return stacks


def signal_main_thread(pid: int, number: int) -> None:
    """A signal to a process's main thread. One to the process may be taken by any thread of a stopped one when it goes on, while
    its main thread leaves the place where it stood.

    Raises:
        ProcessLookupError: there is none.
    """
    tgkill = getattr(ctypes.CDLL(None, use_errno=True), "tgkill", None)  # glibc 2.30
    if tgkill is None:
        os.kill(pid, number)
    elif tgkill(pid, pid, number):
        raise ProcessLookupError(ctypes.get_errno(), f"process {pid}")


def _py_spy(pid: int) -> str:
    command = ["py-spy", "dump", "--native", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PY_SPY_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"\npy-spy: {error}\n"
    return "\npy-spy:\n" + (done.stdout or done.stderr)


def own(beats: Path) -> int:
    """Mark a directory of heartbeats as in use, as long as this process lives. Returns the descriptor that holds the lock."""
    temporary = beats / f".{OWNER_FILE}"
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.replace(temporary, beats / OWNER_FILE)  # locked when it appears
    return descriptor


def remove_abandoned(beats: Path) -> list[Path]:
    """Remove the directories beside `beats` whose watchdog and ranks are gone: a killed attempt, or a killed node, left them.

    One without an owner is left alone: its watchdog may be starting.
    """
    removed = []
    for directory in beats.parent.glob("hope-*"):
        with contextlib.suppress(OSError):
            if directory == beats or directory.is_symlink() or directory.stat().st_uid != os.getuid():
                continue
            with open(directory / OWNER_FILE, "rb+") as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not any(is_alive(beat.pid) for beat in read_beats(directory)):
                    shutil.rmtree(directory, ignore_errors=True)
                    removed.append(directory)
    return removed


def ask_for_nccl_traces() -> None:
    """Have NCCL's flight recorder write what each rank of this node has in flight, where its pipes are set up."""
    prefix = os.environ.get("TORCH_NCCL_DEBUG_INFO_PIPE_FILE")
    for pipe in Path(prefix).parent.glob(f"{Path(prefix).name}*.pipe") if prefix else ():
        with contextlib.suppress(OSError):
            descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            os.write(descriptor, b"1")
            os.close(descriptor)


def process_state(pid: int) -> str:
    """R running, S sleeping, D waiting for a disk, T stopped, Z a zombie; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def is_alive(pid: int) -> bool:
    """Whether a process still runs, or may run again."""
    return process_state(pid) not in ("", "Z", "X")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def main() -> int:
    """`python -m launch.watchdog BEATS REPORTS NODE RANKS NODES START_LIMIT`"""
    beats, reports, node, ranks, nodes, start_limit_s = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends when the ranks have ended
    with contextlib.suppress(OSError):  # a lock that the file system does not have costs the tidying, not the watch
        own(Path(beats))
        remove_abandoned(Path(beats))
    return Watchdog(Path(beats), Path(reports), node, int(ranks), int(nodes), float(start_limit_s)).run()


if __name__ == "__main__":
    sys.exit(main())
