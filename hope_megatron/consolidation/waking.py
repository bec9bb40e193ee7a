"""By day: a model reads, its state adapts, and it answers once more what it has just read.

All tensor-parallel ranks call together, and get the same; B is 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hope_megatron.consolidation.replay import Experience
from hope_megatron.eval.memory_health import memory_mixers, observed_memories
from hope_megatron.model import IGNORE, LanguageModel, ModelState
from hope_megatron.ops.memory_trace import MemoryTrace

_TOKENS_AT_ONCE = 256


class Teacher:
    """A model with a state that reads a stream, or without one.

    Args:
        model: whatever its clocks inside the context are, they tick.
        draws: answers that are drawn for every token.
        seed: of the draws.
    """

    def __init__(self, model: LanguageModel, *, draws: int, seed: int) -> None:
        self.model, self.draws = model, draws
        self.state: ModelState | None = None
        self.generator = torch.Generator().manual_seed(seed)
        self._device = next(model.parameters()).device
        self._learns = model.model_config.cms.learns_in_context

    @torch.no_grad()
    def wake(self, rows: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[Experience]:
        """Read rows as one stream. Each is then answered with the state that has just read it.

        Surprise is the mean error of the memories about their targets before they learn them; without memories it is the loss.
        """
        for inputs, targets in rows:
            self.model.eval()
            x, y = self._row(inputs), self._row(targets)
            before, _ = self._nats(x, y, None)
            errors: list[Tensor] = []
            with self._watched(errors):
                output = self.model(x, y, self.state, return_state=True, learn=self._learns)
            self.state = output.state
            adapted, log_probs = self._nats(x, y, self.state)
            surprise = self._agreed(torch.stack(errors).mean()) if errors else before
            yield Experience(inputs, targets, self.draw(log_probs, targets), surprise, before, adapted)

    @torch.no_grad()
    def answer(self, rows: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[Experience]:
        """Rows of general text, each answered from the initial state: what the model knows before the night."""
        for inputs, targets in rows:
            self.model.eval()
            nats, log_probs = self._nats(self._row(inputs), self._row(targets), None)
            yield Experience(inputs, targets, self.draw(log_probs, targets), 0.0, nats, nats)

    def draw(self, log_probs: Tensor, targets: np.ndarray) -> np.ndarray:
        """[T, D] int32 tokens drawn from [T, V] log probabilities; -100 where nothing is asked."""
        parts = [
            torch.multinomial(part.exp(), self.draws, replacement=True, generator=self.generator)
            for part in log_probs.cpu().split(_TOKENS_AT_ONCE)
        ]
        return np.where((targets == IGNORE)[:, None], IGNORE, torch.cat(parts).numpy()).astype(np.int32)

    def _nats(self, x: Tensor, y: Tensor, state: ModelState | None) -> tuple[float, Tensor]:
        """Nats per token that is asked, and log probabilities [T, V], at a state that does not move."""
        log_probs = self.model(x, state=state).logits[0].log_softmax(-1)
        asked = y[0] != IGNORE
        nats = -log_probs.gather(1, y[0].clamp(min=0).unsqueeze(1)).squeeze(1)
        return (nats * asked).sum().item() / max(1, int(asked.sum())), log_probs

    def _row(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).unsqueeze(0).to(self._device)

    def _watched(self, errors: list[Tensor]) -> Any:
        def keep(layer: int, trace: MemoryTrace) -> None:
            errors.append(trace.surprise.double().mean())

        return observed_memories(self.model, keep) if memory_mixers(self.model) else nullcontext()

    @staticmethod
    def _agreed(value: Tensor) -> float:
        """Mean over all ranks, which hold equally many heads."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(value)
            value = value / dist.get_world_size()
        return value.item()


@torch.no_grad()
def mean_nats(model: LanguageModel, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Nats per token of rows that are each read from the initial state; the mean over rows."""
    model.eval()
    teacher = Teacher(model, draws=1, seed=0)
    return float(np.mean([next(teacher.answer([pair])).before for pair in pairs]))
