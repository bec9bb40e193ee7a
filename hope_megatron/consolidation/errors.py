"""What cannot be consolidated. The message has the remedy."""

from __future__ import annotations


class ConsolidationError(ValueError):
    """A mistake in what was asked for."""

    is_user_error = True
