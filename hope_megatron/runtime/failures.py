"""Why a rank ended: what it leaves to its supervisor, which decides by it what follows."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from hope_megatron.runtime.heartbeat import HEART
from hope_megatron.runtime.records import read_object

LAUNCH_DIR_VARIABLE = "HOPE_LAUNCH_DIR"
"""Directory through which ranks report their process ids and failures to the supervisor."""
ATTEMPT_VARIABLE = "HOPE_ATTEMPT"
"""Name of the attempt that a rank of a Slurm job belongs to."""

USER = "user"
"""A mistake in what was asked for: trying again cannot help."""
CRASH = "crash"
"""An error of the program: it comes again at the same place."""
TRANSIENT = "transient"
"""Of the machine, the network or a disk: it may be gone when the run is started again."""

_TRANSIENT_ERRNO = {
    errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED,
    errno.ECONNREFUSED, errno.EPIPE, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EAGAIN, errno.EBUSY,
    errno.EFBIG, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.EADDRINUSE, errno.EREMOTEIO, errno.ENOTCONN,
}  # fmt: skip
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|nccl|gloo|socket|peer|recv failed|store", re.I
)
_COMMUNICATION = ("DistBackendError", "DistNetworkError", "DistStoreError", "DistError")
_DEVICE = re.compile(r"CUDA error|uncorrectable|CUDNN_STATUS|hardware", re.I)


@dataclass(frozen=True)
class Failure:
    """Why one rank ended."""

    rank: int
    time: float
    """Unix time."""
    kind: str
    """USER, CRASH or TRANSIENT."""
    message: str
    """One line or more for a user's mistake, a traceback otherwise."""
    node: str = ""
    step: int = 0
    """Step under way."""
    phase: str = ""
    signature: str = ""
    """Class of the error and the line of ours that raised it: the same when it comes again."""
    lost_peer: bool = False
    """Whether it only says that another rank was lost."""
    bad_rank: int | None = None
    """The rank whose machine is to blame, where the error knows one."""

    @property
    def is_user_error(self) -> bool:
        """Whether it was a mistake in what was asked for."""
        return self.kind == USER

    @property
    def last_line(self) -> str:
        """The error itself."""
        return (self.message.strip().splitlines() or ["no message"])[-1]


def classify(error: BaseException) -> str:
    """USER, CRASH or TRANSIENT."""
    if kind := getattr(error, "failure_kind", ""):
        return str(kind)
    chain = _chain(error)
    if any(isinstance(link, OSError) and link.errno in _TRANSIENT_ERRNO for link in chain):
        return TRANSIENT
    if getattr(error, "is_user_error", False):
        return USER
    if _lost_peer(error) or any(_DEVICE.search(str(link)) for link in chain):
        return TRANSIENT
    return CRASH


def describe_failure(rank: int, error: BaseException) -> Failure:
    """What there is to say of an error that ends this process."""
    kind = classify(error)
    plain = bool(getattr(error, "is_user_error", False))
    message = str(error) if plain else "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return Failure(
        rank,
        time.time(),
        kind,
        message,
        socket.gethostname(),
        HEART.step,
        HEART.phase,
        _signature(error),
        _lost_peer(error),
        getattr(error, "bad_rank", None),
    )


def report_failure(rank: int, error: BaseException) -> bool:
    """Leave the reason of this rank's end to the supervisor, which prints one for all ranks.

    Returns:
        False if there is no supervisor; the caller then prints the error itself.
    """
    directory = os.environ.get(LAUNCH_DIR_VARIABLE)
    if not directory:
        return False
    path = Path(directory) / f"failure-{rank}.json"
    try:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(describe_failure(rank, error))))
        os.replace(temporary, path)
    except OSError:
        return False  # a full disk, for example: the traceback on the screen must do
    return True


def read_failures(directory: Path) -> list[Failure]:
    """What the ranks reported: causes before those that only lost a peer, each in the order of time."""
    failures = []
    for path in directory.glob("failure-*.json"):
        try:
            failures.append(Failure(**(read_object(path) or {})))
        except TypeError:
            continue  # damaged
    return sorted(failures, key=lambda failure: (failure.lost_peer, failure.time))


def first_cause(failures: list[Failure]) -> Failure | None:
    """The report of the rank that failed first; a user's mistake comes before everything."""
    return next((failure for failure in failures if failure.is_user_error), failures[0] if failures else None)


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in found:
        found.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return found


def _lost_peer(error: BaseException) -> bool:
    """Whether an error of communication ended this rank: mostly, another one was lost."""
    if type(error).__name__ in _COMMUNICATION or isinstance(error, ConnectionError):
        return True
    return isinstance(error, RuntimeError) and bool(_LOST_PEER.search(str(error).partition("\n")[0]))


def _signature(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if any(part in f.filename for part in ("hope_megatron", "data_pipeline", "launch"))]
    where = ours or list(frames)
    place = f" at {Path(where[-1].filename).name}:{where[-1].lineno}" if where else ""
    return f"{type(error).__name__}{place}"
