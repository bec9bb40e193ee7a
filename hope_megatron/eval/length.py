"""One text read far beyond the trained length: loss, time and what the memories hold, by position.

A model with memories alone should keep its loss, and its time and bytes per token, for ever. Where it does not, the drift of the
memories says which of them grows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hope_megatron.eval.memory_health import observed_memories
from hope_megatron.eval.perplexity import EvaluationError
from hope_megatron.model.state import ModelState
from hope_megatron.ops.memory_trace import MemoryTrace


@dataclass(frozen=True)
class Stretch:
    """Positions [start, stop) of the text."""

    start: int
    stop: int
    loss: float
    """Nats per token, mean over the stretch."""
    seconds_per_token: float
    """Median over its windows."""
    state_bytes: int
    """Of everything that is carried on at its end."""
    drift: dict[str, float]
    """At its end, by memory ("layer 1 mem"): distance from the learned initial state, relative to it. {}: no memories."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def read_far(
    model: nn.Module, tokens: np.ndarray, window_tokens: int, tell: Callable[[Stretch], None] = lambda stretch: None
) -> list[Stretch]:
    """Read a text as one stream from the initial state, in stretches that double: [0, w), [w, 2 w), [2 w, 4 w), ...

    Args:
        model: a `LanguageModel` with whole heads (one tensor-parallel rank).
        tokens: [n + 1] ids, n targets.
        window_tokens: w, tokens per forward pass: the sequence length in training. The state is carried on.
        tell: called at the end of each stretch.

    Raises:
        EvaluationError: fewer than two tokens.
    """
    count = len(tokens) - 1
    if count < 1:
        raise EvaluationError(f"{len(tokens)} tokens of text: at least 2 are needed; give more text")
    device, was_training = next(model.parameters()).device, model.training
    inputs = torch.from_numpy(np.asarray(tokens, dtype=np.int64)).unsqueeze(0).to(device)
    found: list[Stretch] = []
    state, start = None, 0
    model.eval()
    try:
        while start < count:
            stop = min(max(2 * start, window_tokens), count)
            stretch, state = _read(model, inputs, start, stop, window_tokens, state)
            found.append(stretch)
            tell(stretch)
            start = stop
    finally:
        model.train(was_training)
    return found


def _read(
    model: nn.Module, inputs: Tensor, start: int, stop: int, window_tokens: int, state: Any
) -> tuple[Stretch, ModelState]:
    """One stretch, and the state at its end."""
    nats = 0.0
    seconds: list[float] = []
    drift: dict[str, float] = {}

    def keep(layer: int, trace: MemoryTrace) -> None:
        drift.update({f"layer {layer} {name}": trace.drift[i, -1].mean().item() for i, name in enumerate(trace.names)})

    for at in range(start, stop, window_tokens):
        end = min(at + window_tokens, stop)
        x, y = inputs[:, at:end], inputs[:, at + 1 : end + 1]
        watched = observed_memories(model, keep) if end == stop else nullcontext()
        began = time.perf_counter()
        with watched:
            output = model(x, targets=y, state=state, return_state=True)
        nats += output.losses.double().sum().item()  # waits for the device
        if end < stop or not seconds:  # watching takes time, which counts only where there is no other window
            seconds.append((time.perf_counter() - began) / (end - at))
        state = output.state
    return Stretch(start, stop, nats / (stop - start), float(np.median(seconds)), state.num_bytes(), drift), state
