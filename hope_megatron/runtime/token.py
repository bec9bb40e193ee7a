"""The token of an attempt: a secret that only its ranks know, by which they know each other."""

from __future__ import annotations

import hashlib
import hmac
import os

TOKEN_VARIABLE = "HOPE_JOB_TOKEN"
"""Set by the supervisor, another one for each attempt; only processes of the same user can read it."""
TAG_BYTES = 16


def tag(message: bytes) -> bytes:
    """What proves that a message comes from a rank of this attempt: HMAC-SHA256, cut to 16 bytes."""
    key = os.environ.get(TOKEN_VARIABLE, "").encode()
    return hmac.new(key, message, hashlib.sha256).digest()[:TAG_BYTES]


def is_authentic(message: bytes, found: bytes) -> bool:
    """Whether a tag is that of the message."""
    return hmac.compare_digest(tag(message), found)
