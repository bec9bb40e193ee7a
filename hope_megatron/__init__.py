"""HOPE (Nested Learning): layers and optimizers for any PyTorch model, and distributed pretraining on Megatron-Core and DeepSpeed.

What is listed here is the library (docs/library.md). A name is imported when it is first used; the package itself loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hope_megatron.runtime.lazy import lazy_names

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


__getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
