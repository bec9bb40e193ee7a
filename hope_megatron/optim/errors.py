"""Errors of the optimizers. All are user errors: the command line prints the message and exits with status 2."""

from __future__ import annotations


class OptimError(Exception):
    """A wrong setting or a wrong use of an optimizer; the message names the parameter or group and the remedy."""

    is_user_error = True


class UnboundShardError(OptimError):
    """A flat vector or a tensor-parallel shard came to `step()` without its layout: a matrix would go without
    Newton-Schulz."""


class ZeroLayoutError(OptimError):
    """The ZeRO wrapper of DeepSpeed does not look as expected, or uses a feature that hides parameters from the
    optimizer."""
