"""How many of PyTorch's operators launch something."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class CountLaunches(TorchDispatchMode):
    """Counts operators that launch something: not views, not allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        nothing = func.overloadpacket.__name__.startswith(
            ("empty", "new_empty", "lift_fresh", "_unsafe_view", "detach")
        )
        self.found += not (views or nothing)
        return func(*args, **(kwargs or {}))
