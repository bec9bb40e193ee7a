"""Files that a command will write when its work is done: refused before it begins if they cannot be."""

from __future__ import annotations

import tempfile
from pathlib import Path


class OutputFileError(ValueError):
    """A file cannot be written."""

    is_user_error = True


def check_writable(*files: Path | None) -> None:
    """Make the directories of files, and see that something can be written there.

    Raises:
        OutputFileError: names the first file that cannot be written.
    """
    for file in files:
        if file is None:
            continue
        try:
            if file.is_dir():
                raise OutputFileError(f"cannot write {file}: it is a directory; name a file in it")
            file.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=file.parent).close()
        except OSError as error:
            raise OutputFileError(f"cannot write {file} into {file.parent}: {error.strerror}; name another") from None
