"""The state of a model's streams: what each layer's mixer remembers, and what its levels have learnt in context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hope_megatron.layers.inner_update import LevelState


class Unlearnt(NamedTuple):
    """Tokens of a segment that is not full yet: they are read, and learnt from once it is."""

    layers: tuple[Any, ...]
    """The mixers' states before them."""
    tokens: Tensor  # [B, n] int64, fewer than a segment
    targets: Tensor  # [B, n] int64


class InnerState(NamedTuple):
    """What streams have learnt in context: by layer and level, None for static levels. Constant in size at segment borders."""

    layers: tuple[tuple[LevelState | None, ...], ...]
    position: int
    """Tokens read while learning, since the clocks began; all streams stand at the same one."""
    unlearnt: Unlearnt | None = None
    """None at a border of segments."""

    def without_rest(self) -> InnerState:
        """Back at the last border: the rest will not be learnt from."""
        rest = 0 if self.unlearnt is None else self.unlearnt.tokens.size(1)
        return self._replace(position=self.position - rest, unlearnt=None)


UNLEARNT = "inner.unlearnt."
"""How the names of `ModelState.tensors()` begin that are there only inside a segment."""


class ModelState(NamedTuple):
    """One state per layer. A constant number of bytes for memory mixers; growing with the stream for attention."""

    layers: tuple[Any, ...]
    inner: InnerState | None = None
    """None: nothing was learnt, every level is static."""

    def detach(self) -> ModelState:
        """Cut the autograd graph: truncated backpropagation through the stream."""
        return _map(self, lambda _, x: x.detach() if isinstance(x, Tensor) else x)

    def to(self, device: torch.device | str) -> ModelState:
        """The same state on another device."""
        return _map(self, lambda _, x: x.to(device) if isinstance(x, Tensor) else x)

    def tensors(self) -> dict[str, Tensor]:
        """Flat and ready to be saved: every tensor under its path, counters as int64 scalars."""
        found: dict[str, Tensor] = {}

        def keep(path: str, x: Any) -> Any:
            found[path] = (
                x.detach().clone().contiguous() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.int64)
            )
            return x

        _map(self, keep)
        return found

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], like: ModelState) -> ModelState:
        """Rebuild what `tensors()` gave; `like` is any state of the same model (its `init_state`).

        Raises:
            KeyError: if the names differ from those of `like`.
        """
        if like.inner is not None and any(name.startswith(UNLEARNT) for name in tensors):
            empty = torch.empty(0, 0, dtype=torch.int64)
            like = like._replace(inner=like.inner._replace(unlearnt=Unlearnt(like.layers, empty, empty)))
        names = set(like.tensors())
        if names != set(tensors):
            raise KeyError(
                f"state of another model: missing {sorted(names - set(tensors))[:3]}, unexpected {sorted(set(tensors) - names)[:3]}"
            )
        return _map(like, lambda path, x: tensors[path] if isinstance(x, Tensor) else int(tensors[path]))

    def num_bytes(self) -> int:
        """Bytes of all tensors, each counted once."""
        sizes: dict[int, int] = {}
        _map(self, lambda _, x: sizes.update({id(x): x.numel() * x.element_size()}) if isinstance(x, Tensor) else None)
        return sum(sizes.values())


def _map(tree: Any, fn: Callable[[str, Any], Any], path: str = "") -> Any:
    """Apply fn(path, leaf) to tensors and counters of nested (named) tuples."""
    if tree is None:
        return None
    if isinstance(tree, tuple):
        names = tree._fields if hasattr(tree, "_fields") else range(len(tree))
        parts = [_map(x, fn, f"{path}.{name}" if path else str(name)) for name, x in zip(names, tree)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return fn(path, tree)
