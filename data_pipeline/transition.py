"""Resuming: on the same data as a matter of course, on other data only on purpose and with a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipeline.errors import DataChangedError, SamplingError
from data_pipeline.samples import DocumentSpan, SampleStream


class TransitionedStream(SampleStream):
    """A stream that took over from earlier data at some sample; its own samples are counted from there.

    Args:
        stream: the data from the last transition on.
        history: one entry per stretch of data, ``{"sample": first, "fingerprint": ...}``; the first begins at 0, the
            last belongs to ``stream``. It is part of the fingerprint, so the record cannot be lost.
    """

    def __init__(self, stream: SampleStream, history: list[dict[str, Any]]) -> None:
        self.stream = stream
        self.history = history
        self.start = int(history[-1]["sample"])
        self.seq_length = stream.seq_length
        self.num_samples, self.end_id = stream.num_samples, stream.end_id
        super().__init__()

    @property
    def tokenizer_sha256(self) -> str:
        return self.stream.tokenizer_sha256

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "transition", "history": self.history, "stream": self.stream.description}

    @property
    def recipe(self) -> dict[str, Any]:
        return self.stream.recipe

    def _local(self, number: int) -> int:
        if number < self.start:
            raise SamplingError(
                f"sample {number} lies before the data transition at sample {self.start}: it belongs to earlier data."
            )
        return number - self.start

    def fill(self, number: int, out: np.ndarray, first: int = 0) -> None:
        self.stream.fill(self._local(number), out, first)

    def documents(self, number: int) -> list[DocumentSpan]:
        return self.stream.documents(self._local(number))

    def provenance(self, span: DocumentSpan) -> dict[str, Any]:
        return self.stream.provenance(span)


def resume(
    stream: SampleStream, state: Mapping[str, Any], *, data_transition: bool = False
) -> tuple[SampleStream, int]:
    """The stream to continue with from a saved position, and the number of its next sample.

    Args:
        stream: the data as configured now.
        state: what `SampleStream.state` gave.
        data_transition: continue although the data have changed, from their beginning, and record it.

    Raises:
        DataChangedError: the data have changed, and that was not allowed; the message lists the differences.
    """
    description = state.get("description", {})
    if description.get("kind") == "transition" and description["history"][-1]["fingerprint"] == stream.fingerprint:
        stream = TransitionedStream(stream, description["history"])
    try:
        return stream, stream.check_state(state)
    except DataChangedError:
        if not data_transition or "sample" not in state or "fingerprint" not in state:
            raise
    if state.get("tokenizer_sha256") != stream.tokenizer_sha256:
        raise DataChangedError(
            "the data after a transition must be made with the same tokenizer, or every token would change its meaning "
            f"(was {state.get('tokenizer_sha256')}, is {stream.tokenizer_sha256}). Prepare them with the old tokenizer."
        )
    number = int(state["sample"])
    if description.get("kind") == "transition":
        earlier = list(description["history"])
    else:
        earlier = [{"sample": 0, "fingerprint": state["fingerprint"]}]
    return TransitionedStream(stream, [*earlier, {"sample": number, "fingerprint": stream.fingerprint}]), number
