"""What can go wrong when a user asks for text."""

from __future__ import annotations


class GenerationError(ValueError):
    """A sampling option, prompt or state file that cannot be used. The message says which, and the remedy."""

    is_user_error = True
