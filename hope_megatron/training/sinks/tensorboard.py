"""TensorBoard: scalars in event files, by TensorBoard's own writer. `tensorboard --logdir runs` shows every run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from hope_megatron.config.run import RunConfig
from hope_megatron.training.sinks.base import Opening, Sink, require_package


class TensorBoard(Sink):
    """A resumed run adds a file to the same directory, which TensorBoard reads as one run."""

    title = "TensorBoard"

    def __init__(self, opening: Opening) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(self.where(opening.config))

    def send(self, step: int, time_s: float, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(self._event(wall_time=time_s, step=step, summary=self._summary(value=values)))
        self._writer.flush()

    def finish(self, status: str, artifacts: Iterable[Path]) -> None:
        self._writer.close()

    @classmethod
    def check(cls, config: RunConfig) -> None:
        require_package("tensorboard", "tensorboard")

    @classmethod
    def where(cls, config: RunConfig) -> str:
        return str(config.run_dir / "tensorboard")
