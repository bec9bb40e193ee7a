"""A bounded local cache of remote shards, shared by the processes of a machine.

A shard is stored under its SHA-256, so a cached file is never the wrong one. It is downloaded under a temporary name,
checked while it arrives, and fetched again after a pause if the store fails or the bytes are wrong. The least recently
used shards make room for new ones; a shard that is mapped by a reader stays readable after its file is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_pipeline.errors import CorruptShardError, ShardError, StoreError
from data_pipeline.files import atomic_file, writing
from data_pipeline.manifest import Manifest, ShardInfo
from data_pipeline.remote import Retry, copy_to
from data_pipeline.shards import INDEX_DTYPE

log = logging.getLogger(__name__)

SHARD_NAME = "shard.tar"
RESERVATION = ".reserved"  # as large as the shard will be, without taking space


def default_directory() -> Path:
    """Where local copies lie when nobody says: under the user's own cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hope_megatron" / "shards"


class ShardCache:
    """Local copies of remote shards.

    Args:
        directory: where they lie; several processes may share it.
        max_bytes: what they may take together.
        attempts: how often a download is tried before it counts as failed.
        backoff_seconds: pause after the first failure; it doubles with every further one, up to a minute.
        prefetch_threads: downloads that run ahead of the reader at a time.
    """

    def __init__(
        self,
        directory: str | Path,
        max_bytes: int = 64 << 30,
        *,
        attempts: int = 6,
        backoff_seconds: float = 1.0,
        prefetch_threads: int = 2,
    ) -> None:
        self.directory = Path(directory)
        self.max_bytes = max_bytes
        self._retry = Retry(attempts, backoff_seconds)
        self._wanted: queue.SimpleQueue[tuple[Manifest, ShardInfo] | None] = queue.SimpleQueue()
        self._requested: set[str] = set()
        self._lock = threading.Lock()
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        # Daemons: a process that ends does not wait for shards that it will not read.
        self._threads = [
            threading.Thread(target=self._prefetch_all, name="shard-prefetch", daemon=True)
            for _ in range(prefetch_threads)
        ]
        for thread in self._threads:
            thread.start()

    def fetch(self, manifest: Manifest, info: ShardInfo) -> Path:
        """The local path of a shard's tar, its index beside it; downloaded if it is not there yet.

        Raises:
            CorruptShardError: the store holds other bytes than the manifest says.
            ShardError: every attempt failed, or the shard is larger than the whole cache.
            OutputError: the cache cannot be written.
        """
        home = self.directory / info.sha256
        path = home / SHARD_NAME
        with self._locked(info.sha256):  # of several processes, one downloads
            if not path.exists():
                for stale in home.glob(".*.tmp"):  # of a process that was killed: under the lock nobody else writes
                    stale.unlink(missing_ok=True)
                self._make_room(home, shard_size(info))
                try:
                    index = path.with_suffix(".idx")
                    self._download(manifest.path(info.index_name), index_size(info), info.index_sha256, index)
                    self._download(
                        manifest.path(info.name), info.bytes, info.sha256, path
                    )  # last: then the index is there
                finally:
                    (home / RESERVATION).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.utime(home)  # used just now
        return path

    def drop(self, info: ShardInfo) -> None:
        """Forget a local copy, e.g. one whose bytes have decayed."""
        shutil.rmtree(self.directory / info.sha256, ignore_errors=True)

    def prefetch(self, manifest: Manifest, infos: Iterable[ShardInfo]) -> None:
        """Start downloading shards that will be wanted soon, in this order. Failures show when they are fetched."""
        room = self.max_bytes
        for info in infos:
            room -= shard_size(info)
            if room < 0:
                break
            with self._lock:
                if info.sha256 in self._requested:
                    continue
                self._requested.add(info.sha256)
            self._wanted.put((manifest, info))

    def _prefetch_all(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            manifest, info = wanted
            try:
                self.fetch(manifest, info)
            except Exception as error:
                log.warning("prefetch of %s failed: %s", info.name, error)
            with self._lock:
                self._requested.discard(info.sha256)

    def close(self) -> None:
        """End the prefetching, after what is wanted already."""
        for _ in self._threads:
            self._wanted.put(None)
        for thread in self._threads:
            thread.join()

    def used_bytes(self) -> int:
        return sum(size for _, size, _ in self._entries())

    # ---- downloading

    def _download(self, url: str, size: int, digest: str, target: Path) -> None:
        for attempt in range(1, self._retry.attempts + 1):
            try:
                with atomic_file(target) as file:
                    if copy_to(url, size, file, self._retry) != digest:
                        raise CorruptShardError(
                            f"{url} has changed: its SHA-256 is not the manifest's ({digest}). Restore the object, or "
                            f"prepare the data again."
                        )
                return
            except StoreError as error:
                raise ShardError(
                    f"cannot fetch {url}: {error.reason}. Check the store and the network; the run can continue from its "
                    f"last checkpoint."
                ) from error
            except CorruptShardError as error:
                if attempt == self._retry.attempts:
                    raise
                log.warning("attempt %d of %d: %s", attempt, self._retry.attempts, error)
                time.sleep(min(self._retry.max_pause_seconds, self._retry.backoff_seconds * 2 ** (attempt - 1)))

    # ---- room

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """(time of last use, bytes, directory) of every cached shard."""
        for home in self.directory.iterdir():
            with contextlib.suppress(OSError):  # another process may remove it meanwhile
                if home.is_dir():
                    sizes = {file.name: file.stat().st_size for file in home.iterdir()}
                    yield home.stat().st_mtime, sizes.get(RESERVATION, sum(sizes.values())), home

    def _make_room(self, home: Path, size: int) -> None:
        """Remove the least recently used shards until ``size`` bytes fit, and reserve them."""
        if size > self.max_bytes:
            raise ShardError(
                f"a shard of {size} bytes does not fit the cache of {self.max_bytes} bytes in {self.directory}: "
                f"enlarge it (max_bytes)."
            )
        with self._locked("room"):
            while (used := self._remove_until(self.max_bytes - size)) + size > self.max_bytes:
                log.info("the cache holds %d bytes of downloads under way, waiting for one to end", used)
                time.sleep(0.1)
            with writing(home), open(_made(home) / RESERVATION, "wb") as file:
                file.truncate(size)

    def _remove_until(self, limit: int) -> int:
        """Remove the least recently used shards until at most ``limit`` bytes are left; returns what is left."""
        entries = sorted(self._entries())
        used = sum(size for _, size, _ in entries)
        for _, size, home in entries:
            if used <= limit:
                break
            with contextlib.suppress(BlockingIOError), self._locked(home.name, wait=False):  # or it is on its way
                shutil.rmtree(home, ignore_errors=True)
                used -= size
        return used

    @contextlib.contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[None]:
        """Hold a name among all processes and threads; the lock dies with its process."""
        with writing(self.directory):
            descriptor = os.open(self.directory / f".{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield
        finally:
            os.close(descriptor)


def _made(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    return directory


def shard_size(info: ShardInfo) -> int:
    """Bytes of a shard with its index."""
    return info.bytes + index_size(info)


def index_size(info: ShardInfo) -> int:
    """Bytes of the index of a shard."""
    return info.documents * 2 * INDEX_DTYPE.itemsize
