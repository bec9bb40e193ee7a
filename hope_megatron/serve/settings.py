"""What the person who starts the server decides."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from hope_megatron.serve.errors import ServeError


@dataclass(frozen=True)
class Settings:
    """Limits and places; units are in the names."""

    model_name: str = "hope"
    tokens: frozenset[str] = frozenset()
    """SHA-256 of the tokens that clients may use, hexadecimal; empty: no authentication, and one client."""
    max_batch: int = 32
    max_waiting: int = 256
    max_body_bytes: int = 16 << 20
    max_tokens: int = 4096
    """Most tokens that one request may draw."""
    max_prompts: int = 16
    """Most prompts times n of one request."""
    max_client_requests: int = 64
    """Requests of one client at once."""
    request_timeout_s: float = 600.0
    session_dir: Path | None = None
    session_bytes: int = 1 << 30
    session_disk_bytes: int = 16 << 30
    session_idle_s: float = 24 * 3600.0
    max_client_sessions: int = 1000


def token_digest(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_tokens(path: Path) -> frozenset[str]:
    """Digests of the tokens in a file, one a line; empty lines and lines with # do not count.

    Raises:
        ServeError: the file cannot be read, others may read it, or it holds no token or a short one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(400, f"cannot read the token file {path}: {error}", code="token_file") from error
    tokens = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if mode & 0o077:
        raise ServeError(400, f"others may read the token file {path}; run chmod 600 {path}", code="token_file")
    if not tokens or min(map(len, tokens)) < 16:
        raise ServeError(
            400,
            f"{path} needs tokens of at least 16 characters, one a line; openssl rand -hex 32 makes one",
            code="token_file",
        )
    return frozenset(map(token_digest, tokens))


def client_of(authorization: str | None, tokens: frozenset[str]) -> str:
    """Who sends a request: the digest of its token, or "anyone" where none is needed.

    Raises:
        ServeError: 401.
    """
    if not tokens:
        return "anyone"
    kind, _, token = (authorization or "").partition(" ")
    digest = token_digest(token.strip())
    known = [hmac.compare_digest(digest, one) for one in sorted(tokens)]  # all are compared, whichever fits
    if kind.lower() != "bearer" or not any(known):
        raise ServeError(401, "give a token of this server: Authorization: Bearer TOKEN", code="invalid_api_key")
    return digest
