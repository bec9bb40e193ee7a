"""Reading from web servers and object stores, through fsspec, so that a bad connection costs time and never data.

Whatever fails in a way that may pass is tried again, a bounded number of times, after growing pauses. A download that
breaks off goes on where it broke. What arrives is counted against the length that the store announced.
"""

from __future__ import annotations

import hashlib
import io
import logging
import random
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, TypeVar, cast

from data_pipeline.errors import DataError, SourceError, StoreError, require
from data_pipeline.formats import kind_of, split_compression
from data_pipeline.source_files import LeftOut, SourceFile, refuse_unreadable_kind

log = logging.getLogger(__name__)

T = TypeVar("T")

BUFFER_BYTES = 4 << 20
PACKAGES = {
    "http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs",
    "hf": "huggingface_hub",
}  # fmt: skip
_TEMPORARY_STATUS = {408, 425, 429}  # of the 4xx: time-outs and "too many requests"; every 5xx is temporary as well
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
_BUGS = (TypeError, AttributeError, LookupError, AssertionError, MemoryError)  # ours or a library's: shown as they are


@dataclass(frozen=True)
class Retry:
    """How often, and how patiently, a store is asked again."""

    attempts: int = 6  # in a row without any progress
    backoff_seconds: float = 1.0  # pause after the first failure; it doubles with every further one
    max_pause_seconds: float = 60.0
    timeout_seconds: float = 60.0  # without a byte over HTTP; other stores have limits of their own

    def pause(self, failures: int, what: str, error: Exception) -> None:
        """Wait before the next attempt.

        Raises:
            StoreError: there is none: the failure is a lasting one, or has come too often.
        """
        error = _cause(error)
        if isinstance(error, (DataError, *_BUGS)):
            raise error
        reason = _reason(error)
        if isinstance(error, ImportError):
            raise StoreError(what, f"{reason}. {_install(what)}") from error
        if _is_lasting(error):
            raise StoreError(what, reason) from error
        if failures >= self.attempts:
            raise StoreError(what, f"{reason} ({failures} attempts). The same command goes on later") from error
        seconds = min(self.max_pause_seconds, self.backoff_seconds * 2 ** (failures - 1))
        seconds = max(seconds * random.uniform(0.5, 1.0), _retry_after(error, self.max_pause_seconds))
        log.warning("attempt %d of %d, %s: %s; next in %.1f s", failures, self.attempts, what, reason, seconds)
        time.sleep(seconds)


RETRY = Retry()


def _cause(error: Exception) -> Exception:
    """What really happened: fsspec says "not found" of a web server whatever the server said, or if there is none."""
    cause = error.__cause__
    from_web = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    return cause if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and from_web else error


def _is_garbled(error: Exception) -> bool:
    """An answer that is no HTTP, as from a connection that broke in the middle. aiohttp calls it status 400; no server said so."""
    return any(kind.__name__ == "HttpProcessingError" for kind in type(error.__cause__).__mro__)


def _is_lasting(error: Exception) -> bool:
    if _is_garbled(error):
        return False
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in _TEMPORARY_STATUS
    return isinstance(error, _LASTING) or "Credentials" in type(error).__name__


def _reason(error: Exception) -> str:
    if _is_garbled(error):
        return "the answer is no HTTP"
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    if isinstance(status, int):
        return " ".join(f"the server answers {status} {message or ''}".split())
    if isinstance(error, FileNotFoundError):
        return "there is no such object"
    if isinstance(error, PermissionError):
        return f"access is denied ({error})"
    if isinstance(error, TimeoutError):
        return f"no answer in time ({error or type(error).__name__})"
    return " ".join(str(error).split()) or type(error).__name__


def _retry_after(error: Exception, longest: float) -> float:
    """Seconds that a server asks to be left alone (RFC 9110, 10.2.3), within reason."""
    headers = getattr(error, "headers", None) or {}
    with suppress(ValueError, TypeError):
        return min(longest, float(headers.get("Retry-After", 0)))
    return 0.0


def _install(url: str) -> str:
    package = PACKAGES.get(url.partition("://")[0].lower(), "fsspec")
    extra = "gcs" if package == "gcsfs" else "remote"
    return f"Install it (pip install {package}), or everything of its kind (pip install -e '.[{extra}]')"


def with_retries(action: Callable[[], T], what: str, retry: Retry | None = None) -> T:
    """The result of an action, tried again as `Retry` says."""
    failures = 0
    while True:
        try:
            return action()
        except Exception as error:
            failures += 1
            (retry or RETRY).pause(failures, what, error)


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _filesystem(url: str, retry: Retry) -> tuple[Any, str]:
    fsspec = require("fsspec", purpose=f"reading {url}", install="fsspec")
    options: dict[str, Any] = {}
    if _is_http(url):
        aiohttp = require("aiohttp", purpose=f"reading {url}", install="aiohttp", extra="remote")
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=retry.timeout_seconds, sock_read=retry.timeout_seconds)
        # Files come as they are stored: one that is named .gz must not arrive decompressed.
        headers = {"Accept-Encoding": "identity"}
        options = {"client_kwargs": {"timeout": timeout, "auto_decompress": False, "headers": headers}}
    elif url.lower().startswith(("s3://", "s3a://")):
        options = {"use_listings_cache": False}
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    return filesystem, path


# ---- listing -------------------------------------------------------------------------------------------------------


def list_remote(url: str, left_out: LeftOut, retry: Retry | None = None) -> list[SourceFile]:
    """The objects that a URL means: one, those of a pattern, or those below a directory. Sorted.

    A web server has no directories but URLs that end with a slash; its only wildcard is ``*``.
    """
    retry = retry or RETRY
    infos, is_directory = with_retries(lambda: _find(url, retry), url, retry)
    if not infos:
        raise SourceError(f"{url} matches no object.")
    files = []
    for path, info in sorted(infos.items()):
        if is_directory and kind_of(path) is None:
            left_out.add(f"kind {split_compression(path)[0] or 'without suffix'}", path)
            continue
        refuse_unreadable_kind(path)
        version = info.get("ETag") or info.get("mtime") or info.get("LastModified") or info.get("Last-Modified") or ""
        files.append(SourceFile(path, path, info.get("size"), str(version)))
    if not files:
        raise SourceError(f"{url} holds no file that can be read. Left out: {left_out}.")
    return files


def _find(url: str, retry: Retry) -> tuple[dict[str, dict[str, Any]], bool]:
    """Address and description of every object of a URL, and whether the URL is a directory."""
    filesystem, root = _filesystem(url, retry)
    is_http = _is_http(url)
    is_directory = False
    if any(mark in root for mark in ("*" if is_http else "*?[")):
        found = filesystem.glob(root, detail=True)
    elif root.endswith("/") if is_http else filesystem.isdir(root):
        found, is_directory = filesystem.find(root, detail=True), True
    else:
        found = {root: filesystem.info(root)}
    infos = {path: info for path, info in found.items() if info.get("type") != "directory"}
    return {
        filesystem.unstrip_protocol(path): info if info.get("size") is not None else filesystem.info(path)
        for path, info in infos.items()
    }, is_directory


# ---- reading -------------------------------------------------------------------------------------------------------


class RemoteFile(io.RawIOBase):
    """The bytes of one object. Reading goes on where it broke off, and ends only where the object does.

    Args:
        url: of the object.
        size: its bytes, None if the store does not say.

    Raises:
        StoreError: the store fails for good, or sends another number of bytes than it announced.
    """

    def __init__(self, url: str, size: int | None, retry: Retry | None = None) -> None:
        self._url, self._size, self._retry = url, size, retry or RETRY
        self._filesystem, self._path = _filesystem(url, self._retry)
        self._position = 0
        self._handle: Any = None
        self._version: str | None = None
        self.is_sequential = _is_http(url)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return not self.is_sequential and self._size is not None

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if not self.seekable():
            raise io.UnsupportedOperation(f"{self._url} is only read from front to back")
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size or 0}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        failures = 0
        while True:
            try:
                data = self._read(len(buffer))
                break
            except StoreError:
                raise
            except Exception as error:
                self._drop()
                failures += 1
                if getattr(error, "status", None) == 416:  # there is no such range: the object is shorter
                    raise StoreError(self._url, f"it ended after {self._position} of {self._size} bytes") from error
                self._retry.pause(failures, self._url, error)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, count: int) -> bytes:
        if self._position == self._size and (self._handle is None or not self.is_sequential):
            return b""  # no server likes to be asked for an empty rest
        if self._handle is None:
            self._handle = self._open()
        elif not self.is_sequential and self._handle.tell() != self._position:
            self._handle.seek(self._position)
        data: bytes = self._handle.read(count)
        end = self._position + len(data)
        if self._size is not None and end > self._size:
            raise StoreError(self._url, f"it sends more than the {self._size} bytes that it announced")
        if not data and self._size is not None and end < self._size:
            raise ConnectionError(f"it ended after {end} of {self._size} bytes")
        return data

    def _open(self) -> Any:
        """The object from the present position on."""
        if self.is_sequential:
            # One stream, not one request per block: many servers know no ranges. With a size, nobody asks for it again.
            headers = {"headers": {"Range": f"bytes={self._position}-"}} if self._position else {}
            handle = self._filesystem.open(self._path, "rb", block_size=0, size=self._size or 1, **headers)
            answer = handle.r.headers
            begin = re.match(r"bytes (\d+)-", answer.get("Content-Range", "")) if handle.r.status == 206 else None
            _pass_over(handle, self._position - (int(begin.group(1)) if begin else 0))
        else:
            handle = self._filesystem.open(self._path, "rb")
            handle.seek(self._position)
            answer = getattr(handle, "details", None) or {}
        version = answer.get("ETag")
        if self._version and version and version != self._version:
            raise StoreError(self._url, "it has changed while it was read. Start again with --overwrite")
        self._version = version
        return handle

    def _drop(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            with suppress(Exception):  # it has failed already
                handle.close()

    def close(self) -> None:
        self._drop()
        super().close()


def _pass_over(handle: Any, count: int) -> None:
    """Read what came before the position, from a server that sends everything again."""
    while count > 0 and (piece := handle.read(min(count, BUFFER_BYTES))):
        count -= len(piece)


def open_remote(file: SourceFile, retry: Retry | None = None) -> IO[bytes]:
    """A source file in a store, from its beginning. One that is read here and there is fetched whole where need be."""
    raw = RemoteFile(file.path, file.size, retry)
    stream = cast(IO[bytes], io.BufferedReader(raw, BUFFER_BYTES))
    if kind_of(file.path) not in ("parquet", "arrow") or raw.seekable():
        return stream
    local = cast(IO[bytes], tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
    with stream:
        while piece := stream.read(BUFFER_BYTES):
            local.write(piece)
    local.seek(0)
    return local


def read_bytes(url: str, retry: Retry | None = None) -> bytes:
    """A whole small object."""
    retry = retry or RETRY

    def size() -> int | None:
        filesystem, path = _filesystem(url, retry)
        found = filesystem.info(path).get("size")
        return None if found is None else int(found)

    with RemoteFile(url, with_retries(size, url, retry), retry) as file:
        return file.readall()


def copy_to(url: str, size: int, target: IO[bytes], retry: Retry | None = None) -> str:
    """Copy an object of a known size into an open file. Returns its SHA-256."""
    digest = hashlib.sha256()
    with RemoteFile(url, size, retry) as file:
        while piece := file.read(BUFFER_BYTES):
            target.write(piece)
            digest.update(piece)
    return digest.hexdigest()
