"""HOPE (Nested Learning): layers and optimizers for any PyTorch model, and distributed pretraining on Megatron-Core and DeepSpeed.

What is listed here is the library (docs/library.md). A name is imported when it is first used; the package itself loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hope_megatron.library import Run, evaluate, generate, load_model, load_weights
    from hope_megatron.library.causal_lm import HopeConfig, HopeForCausalLM
    from hope_megatron.library.nights import consolidate
    from hope_megatron.nn import ContinuumMLP, HopeBlock, NeuralMemory

__version__ = "0.1.0"

_NAMES = {
    "hope_megatron.library": ["Run", "evaluate", "generate", "load_model", "load_weights"],
    "hope_megatron.library.causal_lm": ["HopeConfig", "HopeForCausalLM"],
    "hope_megatron.library.nights": ["consolidate"],
    "hope_megatron.nn": ["ContinuumMLP", "HopeBlock", "NeuralMemory"],
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "ContinuumMLP",
    "HopeBlock",
    "HopeConfig",
    "HopeForCausalLM",
    "NeuralMemory",
    "Run",
    "__version__",
    "consolidate",
    "evaluate",
    "generate",
    "load_model",
    "load_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hope_megatron' has no attribute {name!r}; it offers {', '.join(sorted(_HOMES))}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
