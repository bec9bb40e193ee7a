"""Module specs: which classes a layer is built from."""

from __future__ import annotations

from megatron.core.transformer.spec_utils import ModuleSpec

from hope_megatron.config.model import Mixer, ModelConfig
from hope_megatron.layers.attention_mixer import AttentionMixer
from hope_megatron.layers.block import HopeLayer, HopeLayerSubmodules
from hope_megatron.layers.continuum_mlp import ContinuumMLP
from hope_megatron.layers.memory_mixer import MemoryMixer
from hope_megatron.layers.segment_layer import SegmentLayer

_MIXERS = {"memory": MemoryMixer, "attention": AttentionMixer}


def layer_spec(mixer: Mixer, model: ModelConfig) -> ModuleSpec:
    """A layer with this mixer: "memory" is HOPE and its relatives, "attention" Hope-Attention, Transformer++ and ARMT."""
    layer = SegmentLayer if model.attention.segment_tokens else HopeLayer
    return ModuleSpec(module=layer, submodules=HopeLayerSubmodules(mixer=_MIXERS[mixer], mlp=ContinuumMLP))
