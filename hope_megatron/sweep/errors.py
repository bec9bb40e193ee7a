"""The error that user mistakes in a sweep raise."""

from __future__ import annotations


class SweepError(Exception):
    """A sweep that cannot be planned, run or fitted as asked. The message names the values and the remedy."""

    is_user_error = True
