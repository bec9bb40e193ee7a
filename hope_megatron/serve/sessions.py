"""Sessions: states that stay on the server between requests. Each belongs to one client; its size does not grow with its text.

In memory up to a number of bytes; then those used longest ago go to disk, or are forgotten where there is no directory.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from hope_megatron.serve.errors import ServeError, bad_request
from hope_megatron.serve.session_file import load_session, read_about, save_session

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
Key = tuple[str, str]
"""Client and session id."""


@dataclass
class Session:
    """Where a client's stream stands. Only its fields are replaced; the state itself is never written into."""

    cache: Any = None
    pending: list[int] = field(default_factory=list)
    num_tokens: int = 0
    hidden: str = ""
    """The end of its text that nobody was told: a stop string."""
    busy: bool = False
    used: float = 0.0
    in_memory: bool = True

    @property
    def num_bytes(self) -> int:
        """Bytes of the state in memory."""
        if self.cache is None:
            return 0
        return sum(leaf.nbytes for leaf in tree_leaves(self.cache.layers) if isinstance(leaf, Tensor))


class SessionStore:
    """All sessions of a server. Safe for several threads.

    Args:
        identity: of the model; files of another model are not taken.
        like: a HopeCache of one row, whose structure files are read into.
        directory: where states go that do not fit; None forgets them.
        max_bytes, max_disk_bytes: of states in memory, and of files.
        idle_s: sessions that nobody used for so long expire.
        max_per_client: more are refused.
    """

    def __init__(
        self,
        identity: str,
        like: Any,
        *,
        directory: Path | None = None,
        max_bytes: int = 1 << 30,
        max_disk_bytes: int = 16 << 30,
        idle_s: float = 24 * 3600.0,
        max_per_client: int = 1000,
    ) -> None:
        self.identity, self.like, self.directory = identity, like, directory
        self.max_bytes, self.max_disk_bytes, self.idle_s, self.max_per_client = (
            max_bytes,
            max_disk_bytes,
            idle_s,
            max_per_client,
        )
        self._sessions: OrderedDict[Key, Session] = OrderedDict()  # used longest ago first
        self._lock = threading.RLock()
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            directory.chmod(0o700)
            self._find_files()

    # -- what requests do ------------------------------------------------------------------------------------------------

    def begin(self, client: str, name: str) -> Session:
        """The session, made new if there is none, and busy until `commit` or `release`.

        Raises:
            ServeError: a name that is none (400), a session that another request uses (409), too many (429), or a damaged file.
        """
        check_name(name)
        with self._lock:
            self.expire()
            session = self._sessions.get((client, name))
            if session is None:
                self._check_room(client)
                session = self._sessions[client, name] = Session(used=time.time())
            self._check_idle(name, session)
            if not session.in_memory:
                self._load((client, name), session)
            session.busy = True
            self._touch((client, name))
            return session

    def commit(self, client: str, name: str, cache: Any, pending: list[int], num_tokens: int, hidden: str = "") -> None:
        """Where the session stands now; it is free for the next request."""
        with self._lock:
            session = self._sessions.get((client, name))
            if session is None:
                return  # deleted meanwhile
            session.cache, session.pending, session.hidden, session.busy = cache, list(pending), hidden, False
            session.num_tokens += num_tokens
            self._touch((client, name))
            self._make_room()

    def release(self, client: str, name: str) -> None:
        """Free, as it stood before: a request that failed or was left changes nothing. A session that never stood is gone."""
        with self._lock:
            session = self._sessions.get((client, name))
            if session is not None:
                session.busy = False
                if session.cache is None and not session.pending:
                    del self._sessions[client, name]

    def fork(self, client: str, name: str, to: str) -> None:
        """A second session that stands where this one stands. States are never written into, so nothing is copied."""
        check_name(to)
        with self._lock:
            session = self._existing(client, name)
            self._check_idle(name, session)
            if (client, to) in self._sessions:
                raise ServeError(
                    409, f"session {to!r} is there already; delete it or choose another name", code="session_exists"
                )
            self._check_room(client)
            if not session.in_memory:
                self._load((client, name), session)
            self._sessions[client, to] = Session(
                session.cache, list(session.pending), session.num_tokens, session.hidden, used=time.time()
            )
            self._make_room()

    def save(self, client: str, name: str) -> None:
        """To disk now; it outlives the server."""
        with self._lock:
            session = self._existing(client, name)
            self._check_idle(name, session)
            if self.directory is None:
                raise bad_request("this server keeps no sessions on disk; start it with --session-dir DIR")
            self._write((client, name), session)

    def delete(self, client: str, name: str) -> None:
        """Forget it, in memory and on disk."""
        with self._lock:
            self._check_idle(name, self._existing(client, name))
            self._forget((client, name))

    def describe(self, client: str, name: str) -> dict[str, Any]:
        """What a client may know of its session."""
        with self._lock:
            session = self._existing(client, name)
            return {
                "id": name,
                "object": "session",
                "tokens": session.num_tokens,
                "bytes": session.num_bytes if session.in_memory else self._file((client, name)).stat().st_size,
                "place": "memory" if session.in_memory else "disk",
                "busy": session.busy,
                "used": int(session.used),
            }

    def names(self, client: str) -> list[str]:
        """Of this client's sessions, used longest ago first."""
        with self._lock:
            self.expire()
            return [name for owner, name in self._sessions if owner == client]

    def totals(self) -> dict[str, int]:
        """Sessions and bytes, for metrics."""
        with self._lock:
            here = [session for session in self._sessions.values() if session.in_memory]
            return {
                "sessions": len(self._sessions),
                "memory_bytes": sum(session.num_bytes for session in here),
                "disk_bytes": sum(path.stat().st_size for path in self._files()),
            }

    def close(self) -> None:
        """Everything to disk, if there is one."""
        with self._lock:
            for key, session in list(self._sessions.items()):
                if self.directory is not None and session.in_memory and (session.cache is not None or session.pending):
                    self._write(key, session)

    def expire(self) -> None:
        """Forget what nobody used for `idle_s`."""
        with self._lock:
            oldest = time.time() - self.idle_s
            for key, session in list(self._sessions.items()):
                if session.used < oldest and not session.busy:
                    self._forget(key)

    # -- places ----------------------------------------------------------------------------------------------------------

    def _existing(self, client: str, name: str) -> Session:
        self.expire()
        session = self._sessions.get((client, name))
        if session is None:
            raise ServeError(404, f"there is no session {name!r}; it may have expired", code="session_not_found")
        return session

    @staticmethod
    def _check_idle(name: str, session: Session) -> None:
        if session.busy:
            raise ServeError(
                409,
                f"session {name!r} is used by another request; wait for it, or fork the session",
                code="session_busy",
            )

    def _check_room(self, client: str) -> None:
        if sum(owner == client for owner, _ in self._sessions) >= self.max_per_client:
            raise ServeError(
                429, f"you have {self.max_per_client} sessions, the most; delete some", code="too_many_sessions"
            )

    def _touch(self, key: Key) -> None:
        self._sessions[key].used = time.time()
        self._sessions.move_to_end(key)

    def _make_room(self) -> None:
        """Those used longest ago leave memory, then the disk."""
        total = sum(session.num_bytes for session in self._sessions.values() if session.in_memory)
        for key, session in list(self._sessions.items()):
            if total <= self.max_bytes:
                break
            if session.busy or not session.in_memory:
                continue
            total -= session.num_bytes
            if self.directory is None:
                self._forget(key)
            else:
                self._write(key, session)
                session.cache, session.pending, session.in_memory = None, [], False
        on_disk = sum(path.stat().st_size for path in self._files())
        for key, session in list(self._sessions.items()):
            if on_disk <= self.max_disk_bytes:
                break
            if not session.in_memory and not session.busy:
                on_disk -= self._file(key).stat().st_size
                self._forget(key)

    def _forget(self, key: Key) -> None:
        del self._sessions[key]
        if self.directory is not None:
            self._file(key).unlink(missing_ok=True)

    def _write(self, key: Key, session: Session) -> None:
        about = {
            "client": key[0],
            "name": key[1],
            "model": self.identity,
            "tokens": session.num_tokens,
            "used": session.used,
            "hidden": session.hidden,
        }
        save_session(self._file(key), session.cache, session.pending, about)

    def _load(self, key: Key, session: Session) -> None:
        cache, pending, about = load_session(self._file(key), self.like)
        if (about["client"], about["name"], about["model"]) != (*key, self.identity):
            raise ServeError(500, "the file of this session is another's; delete the session", code="session_damaged")
        session.cache, session.pending, session.num_tokens, session.hidden = (
            cache,
            pending,
            about["tokens"],
            about["hidden"],
        )
        session.in_memory = True

    def _file(self, key: Key) -> Path:
        assert self.directory is not None
        return self.directory / (hashlib.sha256("\0".join(key).encode()).hexdigest() + ".session")

    def _files(self) -> list[Path]:
        return [] if self.directory is None else sorted(self.directory.glob("*.session"))

    def _find_files(self) -> None:
        """Sessions of an earlier server with the same model."""
        found = []
        for path in self._files():
            try:
                about = read_about(path)
                key = (str(about["client"]), str(about["name"]))
                if about["model"] != self.identity:
                    log.warning("%s belongs to another model and is left alone", path)
                elif self._file(key) == path:
                    session = Session(num_tokens=int(about["tokens"]), used=float(about["used"]), in_memory=False)
                    found.append((session.used, key, session))
            except Exception as error:  # safetensors, JSON and keys fail in many ways
                log.warning("%s is no whole session and is left alone: %s", path, error)
        for _, key, session in sorted(found, key=lambda item: item[0]):
            self._sessions[key] = session


def check_name(name: str) -> None:
    """Refuse what is no name of a session."""
    if not NAME.fullmatch(name):
        raise bad_request(
            f"session_id {name[:40]!r} is no name: 1 to 128 letters, digits and . _ : -, a letter or digit first",
            "session_id",
        )
