"""A process that has imported the libraries once and forks ranks: `python -m launch.zygote MODULE,MODULE,...`

Orders come as JSON lines on standard input: `{"argv": [...], "environment": {...}}` forks a rank, which becomes
`python -m hope_megatron ARGV`. Answers go to the descriptor in HOPE_ANSWERS: `{"started": PID}`, `{"ended": PID, "code": N}`. It
leaves when its input ends. Only for machines without GPUs: a driver that was touched before a fork does not survive it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import sys
from typing import Any

from hope_megatron.runtime.process import silence_import_warnings

ANSWERS_VARIABLE = "HOPE_ANSWERS"
_POLL_S = 0.05


def main() -> int:
    """Import, then fork as told."""
    answers = int(os.environ.pop(ANSWERS_VARIABLE))
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)  # of the supervisor's business; a rank takes the defaults back
    silence_import_warnings()
    for module in sys.argv[1].split(","):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what is shared with the ranks stays shared
    buffer = b""
    while True:
        readable, _, _ = select.select([0], [], [], _POLL_S)
        if readable:
            data = os.read(0, 1 << 20)
            if not data:
                os._exit(0)  # nothing here needs an orderly end, and frozen objects would be called leaks
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    os.close(answers)
                    return _become_rank(json.loads(line))
                _answer(answers, {"started": pid})
        _reap(answers)


def _reap(answers: int) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            _answer(answers, {"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def _answer(answers: int, message: dict[str, Any]) -> None:
    os.write(answers, json.dumps(message).encode() + b"\n")


def _become_rank(order: dict[str, Any]) -> int:
    """In the child: what a fresh `python -m hope_megatron` would be, but for the imports."""
    os.setsid()
    gc.unfreeze()
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.default_int_handler if name == signal.SIGINT else signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order["environment"])
    sys.argv = ["hope", *order["argv"]]
    command = importlib.import_module("hope_megatron.cli.main")
    return int(command.main(order["argv"]))


if __name__ == "__main__":
    sys.exit(main())
