"""Errors of the library. All are mistakes in what was asked for."""

from __future__ import annotations


class LibraryError(ValueError):
    """Something that does not exist, or is not installed; the message has the remedy."""

    is_user_error = True
