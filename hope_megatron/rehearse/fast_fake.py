"""Operators on fake tensors, many times faster: what an operator returns is remembered by the shapes that it was given.

PyTorch's own cache asks for the place in the storage too, so that every chunk of a sequence is new to it, and takes several times
longer to answer. Only shapes, strides and dtypes matter for what is remembered here; everything else goes to PyTorch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_NEVER = {"resize_", "set_", "_local_scalar_dense", "is_pinned", "_pin_memory", "lift_fresh", "requires_grad_"}
_UNKNOWN = object()


class _New(NamedTuple):
    """A tensor with a storage of its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _View(NamedTuple):
    """A tensor in the first argument's storage."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    """Beyond that of the argument."""


class _Same(NamedTuple):
    """The first argument itself, changed in place."""


class FastFake:
    """Runs operators of one fake world."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._known: dict[Any, Any] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """func(*args, **kwargs)."""
        if (
            func is torch.ops.prim.device.default
            and type(args[0]) is FakeTensor
            and not self._mode.in_kernel_invocation
        ):
            return args[0].fake_device
        key = self._key(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        made = self._known.get(key, _UNKNOWN)
        if made is _UNKNOWN:
            before = _layout(args[0]) if args else None
            out = func(*args, **kwargs)
            self._known[key] = _described(out, args, before)
            return out
        return func(*args, **kwargs) if made is None else self._make(made, args)

    def _key(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func.namespace != "aten" or func._overloadpacket.__name__ in _NEVER:
            return None
        found: list[Any] = [func]
        if not _append(found, args):
            return None
        for name, value in kwargs.items():
            found.append(name)
            if not _append(found, (value,)):
                return None
        return tuple(found)

    def _make(self, made: Any, args: tuple[Any, ...]) -> Any:
        if isinstance(made, list):
            return [self._make(x, args) for x in made]
        if isinstance(made, _Same):
            return args[0]
        guard = torch._C._DisableTorchDispatch()
        try:
            elem = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
            if isinstance(made, _View):
                base = args[0]
                elem.set_(base.untyped_storage(), base.storage_offset() + made.offset, made.shape, made.stride)
            return FakeTensor(self._mode, elem, torch.device("cpu"))
        finally:
            del guard


def _append(found: list[Any], values: Any) -> bool:
    """Append what identifies arguments; False if something may not be remembered."""
    for x in values:
        kind = type(x)
        if kind is FakeTensor:
            if x.constant is not None or x.fake_device.type != "cpu":
                return False
            found.append((x.shape, x.stride(), x.dtype))
        elif kind in (list, tuple):
            found.append(len(x))
            if not _append(found, x):
                return False
        elif kind in _PLAIN:
            found.append((kind, x))
        else:
            return False
    return True


def _layout(x: Any) -> Any:
    return (x.shape, x.stride(), x.dtype, x.storage_offset()) if isinstance(x, Tensor) else None


def _described(out: Any, args: tuple[Any, ...], before: Any) -> Any:
    """How to make such a result again; None if that is not known."""
    if type(out) in (list, tuple):
        parts = [_described(x, args, before) for x in out]
        return parts if parts and all(part is not None for part in parts) else None
    first = args[0] if args else None
    if type(out) is not FakeTensor or out.constant is not None or out.fake_device.type != "cpu":
        return None
    if out is first:
        return _Same() if _layout(out) == before else None
    storage, shape, stride = out.untyped_storage()._cdata, out.shape, out.stride()
    if isinstance(first, FakeTensor) and first.untyped_storage()._cdata == storage:
        if out.dtype != first.dtype or _layout(first) != before:
            return None
        return _View(shape, stride, out.dtype, out.storage_offset() - first.storage_offset())
    needed = (1 + sum((n - 1) * s for n, s in zip(shape, stride))) * out.element_size() if out.numel() else 0
    own = out.storage_offset() == 0 and out.untyped_storage().nbytes() == needed and not _shares(out, args)
    return _New(shape, stride, out.dtype) if own else None


def _shares(out: Tensor, args: Any) -> bool:
    storage = out.untyped_storage()._cdata
    return any(
        x.untyped_storage()._cdata == storage
        if isinstance(x, Tensor)
        else isinstance(x, (list, tuple)) and _shares(out, x)
        for x in args
    )
