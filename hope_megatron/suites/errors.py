"""Mistakes in what a suite was asked to do."""

from __future__ import annotations


class SuiteError(ValueError):
    """A suite, family, setting or data file that cannot be used. The message names the values and the remedy."""

    is_user_error = True
