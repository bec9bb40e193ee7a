"""Distributed pretraining of HOPE (Nested Learning) on Megatron-Core and DeepSpeed."""

__version__ = "0.1.0"
