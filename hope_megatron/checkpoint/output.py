"""A directory that appears as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.runtime.disks import disk_error
from hope_megatron.runtime.files import sync_directory


@contextmanager
def fresh_directory(out_dir: Path, replaceable: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """A directory that takes the place of `out_dir` if the block succeeds, and vanishes if it does not.

    Args:
        out_dir: must not exist, or be empty, or be `replaceable`.
        replaceable: whether an existing directory is an earlier output, which may go.

    Raises:
        ConversionError: `out_dir` is taken, or cannot be written.
    """
    if out_dir.exists() and not (out_dir.is_dir() and (not any(out_dir.iterdir()) or replaceable(out_dir))):
        raise ConversionError(f"{out_dir} exists and is no earlier export; name another directory, or move that one")
    temporary = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        old = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.old")
        if out_dir.exists():
            out_dir.rename(old)
        temporary.rename(out_dir)
        sync_directory(out_dir.parent)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        if (text := disk_error(error)) is None:
            raise
        raise ConversionError(f"cannot write {out_dir}: {text}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
