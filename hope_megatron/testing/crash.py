"""A crash at any file operation: the operation does not happen, and neither does anything after it."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

_truncate = os.truncate  # unpatched


class Crash(BaseException):
    """The process is gone. Not an Exception: nothing may handle it."""


class FileOperations:
    """Counts the operations that change files below a directory, and crashes at one of them.

    Args:
        below: operations elsewhere do not count.
        crash_at: number of the operation (0 is the first) that does not happen any more; None: never.
        power_cut: what was written and not flushed to disk is lost with the crash: half of it remains.
    """

    def __init__(self, below: Path, crash_at: int | None = None, power_cut: bool = False) -> None:
        self.below, self.crash_at, self.power_cut = str(below), crash_at, power_cut
        self.count = 0
        self.crashed = False
        self._unsynced: dict[int, str] = {}

    def __call__(self, path: Any) -> None:
        """An operation on `path` is about to happen."""
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).startswith(self.below):
            return
        if self.crashed or self.count == self.crash_at:
            first, self.crashed = not self.crashed, True
            if first and self.power_cut:
                self._lose_unsynced()
            raise Crash
        self.count += 1

    def _lose_unsynced(self) -> None:
        for path in set(self._unsynced.values()):
            with contextlib.suppress(OSError):
                _truncate(path, os.path.getsize(path) // 2)

    @contextlib.contextmanager
    def watching(self) -> Iterator[FileOperations]:
        """Patch the operations of this process."""
        original_open, original_fsync = builtins.open, os.fsync

        def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if set(mode) & set("wax+"):
                self(path)
                file = original_open(path, mode, *args, **kwargs)
                if str(path).startswith(self.below):
                    self._unsynced[file.fileno()] = str(path)
                    return _Watched(file, self, str(path))
                return file
            return original_open(path, mode, *args, **kwargs)

        def fsync(descriptor: int) -> None:
            self(self._unsynced.get(descriptor, self.below if self._is_below(descriptor) else ""))
            original_fsync(descriptor)
            self._unsynced.pop(descriptor, None)

        def before(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(path: Any, *args: Any, **kwargs: Any) -> Any:
                self(self._absolute(path, kwargs.get("dir_fd")))
                return function(path, *args, **kwargs)

            return call

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(builtins, "open", opened))
            stack.enter_context(mock.patch.object(io, "open", opened))
            stack.enter_context(mock.patch.object(os, "fsync", fsync))
            for name in ("rename", "replace", "unlink", "remove", "mkdir", "rmdir", "truncate"):
                stack.enter_context(mock.patch.object(os, name, before(getattr(os, name))))
            yield self

    def _is_below(self, descriptor: int) -> bool:
        try:
            return os.readlink(f"/proc/self/fd/{descriptor}").startswith(self.below)
        except OSError:
            return False

    @staticmethod
    def _absolute(path: Any, directory: int | None) -> Any:
        """shutil.rmtree names files relative to an open directory."""
        if directory is None or not isinstance(path, (str, os.PathLike)):
            return path
        return os.path.join(os.readlink(f"/proc/self/fd/{directory}"), path)


class _Watched:
    """A file whose writes count."""

    def __init__(self, file: Any, operations: FileOperations, path: str) -> None:
        self._file, self._operations, self._path = file, operations, path

    def write(self, data: Any) -> Any:
        self._operations(self._path)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()
