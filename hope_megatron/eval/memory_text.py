"""One text through the memories of a model: writes, drift, rates and surprise by position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hope_megatron.eval.memory_health import memory_mixers, observed_memories
from hope_megatron.eval.perplexity import EvaluationError
from hope_megatron.model import IGNORE
from hope_megatron.ops.memory_trace import MemoryTrace


@dataclass(frozen=True)
class LayerHealth:
    """What one layer's memories did with a text of T tokens; means over heads. n memories, P chunks."""

    layer: int
    names: tuple[str, ...]
    ends: np.ndarray
    """[P] tokens read at the end of each chunk."""
    eta: np.ndarray
    """[T] inner learning rate."""
    retention: np.ndarray
    """[T] alpha."""
    surprise: np.ndarray
    """[n, T] error of each memory about its targets, before it learns them."""
    update: np.ndarray
    """[n, P] relative change of the weights by each chunk."""
    drift: np.ndarray
    """[n, P] distance from the learned initial state, relative to it."""

    def standardized_surprise(self, reach: int) -> np.ndarray:
        """[n, T] surprise in standard deviations above its mean over `reach` tokens before and after: comparable between
        memories and along a long text, in which they drift."""
        at, length = np.arange(self.surprise.shape[1]), self.surprise.shape[1]
        first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, length)
        centred = self.surprise - self.surprise.mean(axis=1, keepdims=True)  # keeps the squares small
        sums, squares = (np.pad(x.cumsum(axis=1), ((0, 0), (1, 0))) for x in (centred, centred**2))
        mean, square = ((x[:, last] - x[:, first]) / (last - first) for x in (sums, squares))
        spread = np.sqrt(np.maximum(square - mean**2, 0.0))
        return np.where(spread > 1e-9, (centred - mean) / np.maximum(spread, 1e-9), 0.0)


@dataclass(frozen=True)
class TextHealth:
    """A text of T tokens and what it did to every layer's memories."""

    tokens: np.ndarray
    """[T] ids."""
    losses: np.ndarray
    """[T] nats of each token given those before it; NaN for the first."""
    layers: list[LayerHealth]
    reach: int
    """Tokens before and after, against which surprise is standardised."""

    @property
    def names(self) -> tuple[str, ...]:
        """The memories; the same in every layer."""
        return self.layers[0].names

    def surprise(self) -> np.ndarray:
        """[n, T] standardised surprise, mean over layers."""
        return np.mean([layer.standardized_surprise(self.reach) for layer in self.layers], axis=0)

    def most_surprising(self, count: int) -> list[int]:
        """Positions of the tokens that surprised the memories most, taken together."""
        return np.argsort(-self.surprise().mean(axis=0), kind="stable")[:count].tolist()

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        surprise = self.surprise()
        known = ~np.isnan(self.losses)
        return {
            "tokens": self.tokens.tolist(),
            "losses": self.losses.tolist(),
            "memories": list(self.names),
            "surprise_and_loss_correlation": {
                name: _correlation(surprise[i, known], self.losses[known]) for i, name in enumerate(self.names)
            },
            "layers": [
                {
                    "layer": layer.layer,
                    "chunk_ends": layer.ends.tolist(),
                    "eta": layer.eta.tolist(),
                    "retention": layer.retention.tolist(),
                    **{
                        figure: dict(zip(layer.names, getattr(layer, figure).tolist()))
                        for figure in ("surprise", "update", "drift")
                    },
                }
                for layer in self.layers
            ],
        }


@torch.no_grad()
def read_text(model: nn.Module, tokens: np.ndarray, window_tokens: int) -> TextHealth:
    """Read a text as one stream from the initial state, and watch the memories.

    Args:
        model: a `LanguageModel` with whole heads (one tensor-parallel rank).
        tokens: [T] ids, T of at least 2.
        window_tokens: tokens per forward pass, which bounds memory and changes nothing; and the reach of the text against
            which surprise is standardised.

    Raises:
        EvaluationError: a text too short, or a model without memories.
    """
    if not memory_mixers(model):
        raise EvaluationError("this model has no memories to look at: every layer is attention")
    if len(tokens) < 2:
        raise EvaluationError(f"{len(tokens)} tokens of text: at least 2 are needed; give more text")
    traces: dict[int, list[MemoryTrace]] = {}
    device, was_training = next(model.parameters()).device, model.training
    inputs = torch.from_numpy(np.asarray(tokens, dtype=np.int64)).unsqueeze(0).to(device)
    targets = torch.nn.functional.pad(inputs[:, 1:], (0, 1), value=IGNORE)
    losses, state = [], None
    model.eval()
    try:
        with observed_memories(model, lambda layer, trace: traces.setdefault(layer, []).append(trace)):
            for x, y in zip(inputs.split(window_tokens, 1), targets.split(window_tokens, 1)):
                output = model(x, targets=y, state=state, return_state=True)
                state = output.state
                losses.append(output.losses[0].double().cpu().numpy())
    finally:
        model.train(was_training)
    shifted = np.concatenate([[np.nan], np.concatenate(losses)[:-1]])
    layers = [_join(layer, parts) for layer, parts in sorted(traces.items())]
    return TextHealth(np.asarray(tokens), shifted, layers, window_tokens)


def _join(layer: int, parts: list[MemoryTrace]) -> LayerHealth:
    """One layer's traces of consecutive windows of one stream."""
    starts = np.cumsum([0] + [part.eta.size(1) for part in parts[:-1]])
    over = lambda name, dims: np.concatenate(  # noqa: E731
        [getattr(part, name).double().mean(dims).cpu().numpy() for part in parts], axis=-1
    )
    return LayerHealth(
        layer=layer,
        names=parts[0].names,
        ends=np.concatenate([part.ends.numpy() + start for part, start in zip(parts, starts)]),
        eta=over("eta", (0, 2)),
        retention=over("alpha", (0, 2)),
        surprise=over("surprise", (1, 3)),
        update=over("update", (2, 3)),
        drift=over("drift", (2, 3)),
    )


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 1 and x.std() > 0 and y.std() > 0 else None
