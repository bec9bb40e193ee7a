"""A real web server and a real S3-compatible store on the loopback device, that fail in the ways they are told to."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FaultyServer(ThreadingHTTPServer):
    """Serves ``files`` by path, or passes requests on to ``upstream``.

    Attributes:
        files: content by path.
        upstream: port of another server on this machine; then it answers instead.
        faults: kinds of failure, one for each of the next GET requests that match ``only``; "" is none.
        heads: whether HEAD requests fail as well.
        store: of tests that have a client of the upstream.
        only: regular expression on paths.
        lasting: a fault for every GET from now on.
        ranges: whether Range requests are answered with a part.
        announced: length that HEAD claims, if not the true one.
        requests: (method, path, Range header) of every request so far.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, upstream: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.upstream = upstream
        self.faults: list[str] = []
        self.heads = False
        self.store: Any = None
        self.only = ""
        self.lasting = ""
        self.ranges = True
        self.announced: int | None = None
        self.headers: dict[str, str] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def next_fault(self, path: str) -> str:
        with self.lock:
            if not re.search(self.only, path):
                return ""
            return self.lasting or (self.faults.pop(0) if self.faults else "")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is no error here."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        server = self.server
        asked = self.headers.get("Range", "")
        server.requests.append((self.command, self.path, asked))
        fault = server.next_fault(self.path) if with_body or server.heads else ""
        if fault.isdigit():
            self._send(int(fault), b"later", {"Retry-After": "0.01"} if fault == "429" else {}, "", with_body)
            return
        if fault == "garbled":
            self.wfile.write(b'{"text": "in the middle of another answer"}\r\n\r\n')
            self.close_connection = True
            return
        status, body, headers = self._upstream() if server.upstream else self._file(asked)
        if not with_body and server.announced is not None:
            headers["Content-Length"] = str(server.announced)
        self._send(status, body, headers, fault, with_body)

    def _file(self, asked: str) -> tuple[int, bytes, dict[str, str]]:
        server = self.server
        body = server.files.get(self.path.partition("?")[0])
        if body is None:
            return 404, b"", {}
        headers = dict(server.headers)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked) if server.ranges else None
        if found is None:
            return 200, body, headers
        first, last = int(found.group(1)), int(found.group(2) or len(body) - 1)
        if first >= len(body):
            return 416, b"", headers
        headers["Content-Range"] = f"bytes {first}-{min(last, len(body) - 1)}/{len(body)}"
        return 206, body[first : last + 1], headers

    def _upstream(self) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=30)
        connection.request(self.command, self.path, headers=dict(self.headers.items()))
        answer = connection.getresponse()
        body = answer.read()
        kept = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("transfer-encoding", "connection")
        }
        return answer.status, body, kept

    def _send(self, status: int, body: bytes, headers: dict[str, str], fault: str = "", with_body: bool = True) -> None:
        sent, length = body, {"Content-Length": str(len(body))}
        if fault == "short":  # and the header agrees: only the announced length can tell
            sent = body[: len(body) // 2]
            headers = {**headers, "Content-Length": str(len(sent))}
        headers = {**length, **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if not with_body and fault != "reset":
            return
        if fault in ("cut", "reset", "stall"):
            self.wfile.write(sent[: len(sent) // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(1.0)
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR) if fault == "cut" else self.connection.close()
            return
        if fault == "slow":
            for start in range(0, len(sent), max(1, len(sent) // 20)):
                self.wfile.write(sent[start : start + max(1, len(sent) // 20)])
                self.wfile.flush()
                time.sleep(0.02)
            return
        self.wfile.write(sent)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def running(server: FaultyServer) -> Iterator[FaultyServer]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
