"""Errors a user can cause, each saying what is wrong, where, and what to do about it."""

from __future__ import annotations

import importlib
from types import ModuleType


class DataError(Exception):
    """Base class. The command line prints the message and exits with status 2."""

    is_user_error = True


class SourceError(DataError):
    """A source of text is missing, unreadable, or of a kind that cannot be read."""


class StoreError(SourceError):
    """A web server or object store does not give what it was asked for. ``reason`` is the message without the URL."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"cannot read {url}: {reason}.")
        self.reason = reason


class TokenizerError(DataError):
    """A tokenizer model is missing, damaged, or does not fit the data."""


class VocabularyError(TokenizerError):
    """The wanted vocabulary does not fit the corpus. ``limit`` is the nearest size that works, when known."""

    def __init__(self, message: str, limit: int | None = None) -> None:
        super().__init__(message)
        self.limit = limit


class OutputError(DataError):
    """The output directory is taken by other work, or cannot be written."""


class EmptySplitError(DataError):
    """A split (train or heldout) would hold no document at all."""


class ManifestError(DataError):
    """A manifest is missing, damaged, or of another format."""


class ShardError(DataError):
    """A shard differs from what its manifest says: missing, truncated, changed, or not a shard at all."""


class CorruptShardError(ShardError):
    """A shard is there, and its content is not what the manifest says."""


class TokenRangeError(DataError):
    """A shard holds a token id outside the vocabulary."""


class DataChangedError(DataError):
    """The data differ from those that a saved position belongs to. The message lists the differences."""


class SamplingError(DataError):
    """A sample, batch or mixture was asked for that the data cannot give."""


class MissingDependencyError(DataError):
    """An optional package is needed for what was asked."""


def require(module: str, *, purpose: str, install: str, extra: str = "data") -> ModuleType:
    """Import an optional module, or say which package to install.

    Args:
        module: dotted module name.
        purpose: what it is needed for, e.g. ``"reading .zst files"``.
        install: what to hand to ``pip install``.
        extra: the extra of this project that holds it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs the Python package '{install}', which cannot be imported ({error}). "
            f"Install it (pip install {install}), or everything of its kind (pip install -e '.[{extra}]')."
        ) from error
