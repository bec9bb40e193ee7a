"""JSON lines: what a collector of logs reads. `start`, `metrics` and `end` lines, each written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hope_megatron.config.run import RunConfig
from hope_megatron.training.sinks.base import Opening, Sink, TrackingError


class JsonLines(Sink):
    """Appends to one file; several runs may share it, since every line names its run."""

    title = "the JSON lines file"

    def __init__(self, opening: Opening) -> None:
        self._path = Path(self.where(opening.config))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._run = opening.config.name
        self._write("start", config=opening.config.model_dump(mode="json"), tags=dict(opening.tags))

    def send(self, step: int, time_s: float, metrics: Mapping[str, float]) -> None:
        self._write("metrics", step=step, time=time_s, **metrics)

    def finish(self, status: str, artifacts: Iterable[Path]) -> None:
        self._write("end", status=status, files=[str(path) for path in artifacts if path.is_file()])

    @classmethod
    def check(cls, config: RunConfig) -> None:
        path = Path(cls.where(config))
        if path.is_dir():
            raise TrackingError(f"tracking.jsonl_file={path} is a directory; name a file in it")

    @classmethod
    def where(cls, config: RunConfig) -> str:
        return str(config.tracking.jsonl_file or config.run_dir / "tracking.jsonl")

    def _write(self, event: str, **values: Any) -> None:
        line = json.dumps({"event": event, "run": self._run, **values}) + "\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())  # one call: lines of several runs do not mix
        finally:
            os.close(descriptor)
