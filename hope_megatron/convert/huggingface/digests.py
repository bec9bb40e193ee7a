"""Digests of an exported model: DIR/hope_digests.json, which other tools ignore, checked before the model is read here.

Files that people rightly edit (model card, sampling defaults) are not digested.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.runtime.files import file_sha256

log = logging.getLogger(__name__)

DIGESTS_NAME = "hope_digests.json"
FORMAT = "hope-digests-v1"
_FREE = {DIGESTS_NAME, "README.md", "generation_config.json"}


def write_digests(directory: Path) -> None:
    """Digest every file of a finished export."""
    files = {path.name: _sha256(path) for path in sorted(directory.iterdir()) if path.name not in _FREE}
    text = json.dumps({"format": FORMAT, "files": files}, indent=1)
    (directory / DIGESTS_NAME).write_text(text + "\n", encoding="utf-8")


def verify_digests(directory: Path) -> None:
    """Compare the files of an export with their digests. An export without digests is read unverified, which is said.

    Raises:
        ConversionError: naming the file that is missing or differs.
    """
    path = directory / DIGESTS_NAME
    if not path.exists():
        log.warning("%s has no %s: its files are read unverified; export the model again", directory, DIGESTS_NAME)
        return
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        files = dict(table["files"])
        if table["format"] != FORMAT or not files or any(Path(name).name != name for name in files):
            raise ValueError("it is not the table that was written")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConversionError(f"{path} is damaged ({error}); export or download the model again") from None
    for name, expected in files.items():
        file = directory / name
        if not file.is_file():
            raise ConversionError(f"{file} is missing; export or download the model again")
        if _sha256(file) != expected:
            raise ConversionError(
                f"{file} is not what was exported: its SHA-256 is not the one in {DIGESTS_NAME}. Export or download the "
                f"model again; if you changed the file on purpose, remove {path}"
            )


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}") from None
