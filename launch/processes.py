"""The processes of ranks on this machine: fresh ones, or forks of one that has imported the libraries already."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Protocol

from launch.zygote import ANSWERS_VARIABLE


class Process(Protocol):
    """A rank's process."""

    pid: int

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""

    def kill(self) -> None:
        """End it."""


class Starter(Protocol):
    """Starts processes of ranks."""

    def start(self, argv: Sequence[str], environment: Mapping[str, str]) -> Process:
        """`python -m hope_megatron ARGV` with more variables, in a session of its own."""

    def close(self) -> None:
        """No more processes will be started."""


class FreshProcesses:
    """Each rank is an interpreter of its own."""

    def start(self, argv: Sequence[str], environment: Mapping[str, str]) -> Process:
        command = [sys.executable, "-m", "hope_megatron", *argv]
        return subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)

    def close(self) -> None:
        """Nothing is held."""


class Nursery:
    """Ranks are forked from one process that has imported `modules`: a restart takes a second, where imports take ten or more.

    Args:
        modules: what it imports.
        environment: variables that libraries read when they are imported.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self._modules, self._environment = list(modules), dict(environment)
        self._zygote: subprocess.Popen[bytes] | None = None
        self._started: list[_Forked] = []
        self._changed = threading.Condition()

    def start(self, argv: Sequence[str], environment: Mapping[str, str]) -> Process:
        if self._zygote is None or self._zygote.poll() is not None:
            self._open()
        assert self._zygote is not None and self._zygote.stdin is not None
        child = _Forked(self)
        with self._changed:
            self._started.append(child)
        order = {"argv": list(argv), "environment": dict(environment)}
        self._zygote.stdin.write(json.dumps(order).encode() + b"\n")
        self._zygote.stdin.flush()
        return child

    def close(self) -> None:
        """Let the zygote go; ranks that still live are ended with it."""
        if self._zygote is not None:
            assert self._zygote.stdin is not None
            with suppress(OSError):
                self._zygote.stdin.close()
            try:
                self._zygote.wait(5.0)
            except subprocess.TimeoutExpired:
                self._zygote.kill()
                self._zygote.wait()

    def _open(self) -> None:
        reading, writing = os.pipe()
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "launch.zygote", ",".join(self._modules)],
            env={**os.environ, **self._environment, ANSWERS_VARIABLE: str(writing)},
            stdin=subprocess.PIPE,
            pass_fds=[writing],
            start_new_session=True,
        )
        os.close(writing)
        with self._changed:
            self._started = []
        threading.Thread(target=self._listen, args=(os.fdopen(reading, "rb"),), daemon=True).start()

    def _listen(self, answers: IO[bytes]) -> None:
        """Body of a thread: what the zygote says of its children, until it is gone."""
        children, waiting = self._started, 0
        for line in answers:
            message = json.loads(line)
            with self._changed:
                if "started" in message:
                    children[waiting].pid, waiting = message["started"], waiting + 1
                else:
                    for child in children[:waiting]:
                        if child.pid == message["ended"] and child.code is None:
                            child.code = message["code"]
        with self._changed:
            for child in children:  # the zygote is gone, and its children with it
                child.code = -signal.SIGKILL if child.code is None else child.code


class _Forked:
    """A rank that the zygote has been asked for."""

    def __init__(self, nursery: Nursery) -> None:
        self.pid = 0  # until it is there
        self.code: int | None = None
        self._kill = False

    def poll(self) -> int | None:
        if self._kill and self.code is None:
            self.kill()  # it was not there yet
        return self.code

    def kill(self) -> None:
        self._kill = True
        if self.pid and self.code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
