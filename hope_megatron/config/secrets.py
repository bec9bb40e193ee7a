"""User names and passwords in URIs: known to the process, masked in everything that is written or printed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

MASK = "***"

# The user part ends with the last @ before the path. A password with a slash in it hides that @ behind the "path"; then
# what looks like a port is no number.
_USER_PART = re.compile(r"(?<=://)(?:[^/?#\s]*@|[^/?#\s:@\[]*:(?!\d*(?:[/?#\s]|$))\S*@)")
_SECRET_PARAMETER = re.compile(r"(?i)(?<=[?&])((?:password|passwd|pwd|token|secret|api_?key|sslpassword)=)[^&#\s]+")

TRACKING_URI = "MLFLOW_TRACKING_URI"
_TRACKING_USER = "MLFLOW_TRACKING_USERNAME"


def mask_credentials(text: str) -> str:
    """Any text, with the user part of every URI and its secret parameters replaced by ***: `http://***@host`."""
    return _SECRET_PARAMETER.sub(rf"\1{MASK}", _USER_PART.sub(f"{MASK}@", text))


def has_credentials(uri: str) -> bool:
    """Whether there is something to mask."""
    return mask_credentials(uri) != uri


def is_masked(uri: str) -> bool:
    """Whether a URI was read from where it had been written masked."""
    return MASK in uri and mask_credentials(uri) == uri


def unmask_tracking_uri(uri: str, environment: Mapping[str, str] = os.environ) -> str:
    """The tracking URI that a masked one stands for, where the environment knows it; else as given.

    MLFLOW_TRACKING_URI holds the whole URI, or MLFLOW_TRACKING_USERNAME (with MLFLOW_TRACKING_PASSWORD) what MLflow's client
    then uses instead of a user part.
    """
    if not is_masked(uri):
        return uri
    whole = environment.get(TRACKING_URI, "")
    if mask_credentials(whole) == uri:
        return whole
    return uri.replace(f"{MASK}@", "", 1) if _TRACKING_USER in environment else uri


def tracking_environment(uri: str | None) -> dict[str, str]:
    """The variable by which processes that read a masked configuration get the real URI; empty where nothing is masked."""
    return {TRACKING_URI: uri} if uri is not None and has_credentials(uri) else {}
