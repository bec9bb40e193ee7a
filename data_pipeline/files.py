"""Small helpers for writing files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from data_pipeline.errors import OutputError


def canonical_json(value: Any) -> bytes:
    """The one JSON spelling of a value: sorted keys, no spaces. Digests are taken over it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def sync_directory(path: Path) -> None:
    """Make renames inside a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write through a temporary one beside it: readers see the old content or the new, never a part.

    Raises:
        OutputError: it cannot be written; nothing of it is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write a file in one step, as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


def check_writable(directory: str | Path) -> None:
    """Raise OutputError if a file cannot be made in a directory: before long work whose result is to go there."""
    with writing(directory):
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x")


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as readable JSON, atomically and with the same bytes every time."""
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read a file that `write_json` wrote."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise OutputError(f"{path} is damaged ({error}). Make it again with overwrite=True (--overwrite).") from error


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


_REMEDIES = {
    (
        errno.ENOSPC,
        errno.EDQUOT,
    ): "The disk is full: free some space and run the same command again; it continues where it stopped",
    (errno.EACCES, errno.EPERM, errno.EROFS): "Choose a directory that you may write to",
    (
        errno.EEXIST,
        errno.ENOTDIR,
        errno.EISDIR,
    ): "A file and a directory of the same name collide: choose another output path",
}


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into a named error with the remedy."""
    try:
        yield
    except BrokenPipeError:  # nobody reads the output any more, which is no fault
        raise
    except OSError as error:
        found = [remedy for numbers, remedy in _REMEDIES.items() if error.errno in numbers]
        remedy = found[0] if found else "Check the disk, then run the same command again; it continues where it stopped"
        raise OutputError(f"cannot write {path}: {error.strerror or error}. {remedy}.") from error


def close_all(files: Iterable[IO[bytes]]) -> None:
    """Close files whose content was made safe, or is given up: what is left in their buffers does not matter."""
    for file in files:
        with contextlib.suppress(OSError):
            file.close()


def print_whole(text: str) -> None:
    """Write a text to standard output to its last byte.

    Raises:
        OutputError: the file behind standard output cannot be written.
    """
    try:
        with writing("standard output"):
            sys.stdout.write(text)
            sys.stdout.flush()
    except OutputError:
        # What is left in the buffer would fail once more when Python ends, and change the exit status.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold a directory for this process. The lock dies with the process, so none is ever stale."""
    path = directory / ".lock"
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{directory} is being written by another process. Wait for it, or choose another output directory."
            ) from None
        yield
    finally:
        os.close(descriptor)
