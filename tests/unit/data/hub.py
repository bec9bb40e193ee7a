"""A hub of data sets on this machine: what huggingface_hub's file system asks of https://huggingface.co, answered over HTTP."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME = "owner/name"
COMMIT = "1" * 40


class _Hub(BaseHTTPRequestHandler):
    """Answers for the one data set of its server."""

    server: HubServer

    def log_message(self, *args: Any) -> None:
        self.server.asked.append(f"{self.command} {self.path}")

    def do_POST(self) -> None:
        """Information about paths that the body names."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode().replace("%2F", "/")
        self._json([entry for entry in self._entries() if entry["path"] in body])

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.search(r"/resolve/[^/]+/(.*)$", path):
            self._file(self.server.files[match[1]])
        elif match := re.search(r"/tree/[^/]+/?(.*)$", path):
            self._json(
                self._entries() if match[1] else [{"type": "directory", "path": "data", "oid": COMMIT, "size": 0}]
            )
        else:
            files = [{"rfilename": name} for name in self.server.files]
            self._json({"id": NAME, "sha": COMMIT, "siblings": files, "private": False, "tags": [], "downloads": 0})

    do_HEAD = do_GET

    def _entries(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": COMMIT} for name, data in self.server.files.items()
        ]

    def _file(self, data: bytes) -> None:
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or len(data) - 1)
            self._send(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})
        else:
            self._send(200, data, {"ETag": '"1"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


class HubServer(ThreadingHTTPServer):
    """Files of the data set `NAME`, all in its folder data/, and the requests that came."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Hub)
        self.files, self.asked = dict(files), list[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub(files: Mapping[str, bytes]) -> Iterator[HubServer]:
    """A hub while the block runs."""
    with HubServer(files) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
