"""The error of the optimizers, which the plan of their exchange raises too."""

from __future__ import annotations


class OptimError(Exception):
    """A wrong setting or a wrong use of an optimizer; the message names the parameter or group and the remedy."""

    is_user_error = True
