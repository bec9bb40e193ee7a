"""Disks that are full, read-only or gone: what to say, and how to go on without them."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
from collections.abc import Iterator

log = logging.getLogger(__name__)

_REMEDIES = {
    errno.ENOSPC: "make room, then run the same command again",
    errno.EDQUOT: "make room within the quota, then run the same command again",
    errno.EFBIG: "this file system takes no file so large; choose another place",
    errno.EROFS: "the file system is read-only; choose another place, or repair it",
    errno.EACCES: "choose a place that you may use, or change the permissions",
    errno.EPERM: "choose a place that you may use, or change the permissions",
    errno.EIO: "the disk or its connection fails; choose another place, or repair it",
    errno.ESTALE: "the network file system was mounted again; run the same command again",
    errno.ENAMETOOLONG: "choose a shorter name",
}
_WRITERS = re.compile(
    r"os error (28|122|27|30)|StorageFull|No space left|PytorchStreamWriter failed|Disk quota exceeded|File too large"
    r"|unexpected pos \d+ vs \d+",
    re.I,
)
"""How libraries that hide the operating system's error speak of it (safetensors, torch.save)."""


def disk_error(error: BaseException) -> str | None:
    """What an error of a disk is called, and what to do; None for any other error."""
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        return f"{what}; {_REMEDIES[error.errno]}"
    if _WRITERS.search(str(error)):
        return f"a file could not be written ({str(error).splitlines()[0][:200]}); {_REMEDIES[errno.ENOSPC]}"
    return None


@contextlib.contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Around work that training can do without: an error of a disk is said, and goes no further."""
    try:
        yield
    except Exception as error:
        if (text := disk_error(error)) is None:
            raise
        log.error("%s was not written: %s; training goes on", what, text)
