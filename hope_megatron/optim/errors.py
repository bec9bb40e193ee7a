"""Errors of the optimizers. All are user errors: the command line prints the message and exits with status 2."""

from __future__ import annotations

from hope_megatron.config.matrices.errors import OptimError as OptimError


class UnboundShardError(OptimError):
    """A flat vector or a tensor-parallel shard came to `step()` without its layout: a matrix would go without
    Newton-Schulz."""


class ZeroLayoutError(OptimError):
    """The ZeRO wrapper of DeepSpeed does not look as expected, or uses a feature that hides parameters from the
    optimizer."""
