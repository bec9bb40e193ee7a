"""HOPE's layers for any PyTorch model: no Megatron-Core, no process groups, no configuration files.

`layers.py` holds the mathematics, and travels with exported models. The other files are what people construct.
"""

from hope_megatron.nn.block import BlockState, ContinuumMLP, HopeBlock
from hope_megatron.nn.neural_memory import NeuralMemory, NeuralMemoryState

__all__ = ["BlockState", "ContinuumMLP", "HopeBlock", "NeuralMemory", "NeuralMemoryState"]
