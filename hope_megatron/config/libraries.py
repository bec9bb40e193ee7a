"""Which library computes each part of a step, where several can (runtime/step_parts.py)."""

from __future__ import annotations

from typing import Literal

from hope_megatron.config.base import Section


class LibrariesConfig(Section):
    """Who computes the parts of a step. `auto`: the first that can and is right on the device; the log has the table.
    A library that is named and cannot serve stops the run. Those that need a GPU have not been run on one."""

    norm: Literal["auto", "apex", "torch"] = "auto"
    """RMSNorm: NVIDIA apex's, or PyTorch's."""
    pointwise: Literal["auto", "compile", "torch"] = "auto"
    """SwiGLU, rotary, convolution, gates and the inside of the loss: a kernel each by torch.compile, or operators one by one."""
    short_conv: Literal["auto", "causal_conv1d", "torch"] = "auto"
    """The short convolution and its SiLU: causal-conv1d's, or as `pointwise` says."""
    attention: Literal["auto", "flex", "sdpa"] = "auto"
    """Softmax attention: `flex` needs no explicit mask for windows and documents."""
    clipping: Literal["auto", "apex", "torch"] = "auto"
    """Norm of all gradients and scaling by it: apex's multi-tensor kernels, or PyTorch's."""
    adam: Literal["auto", "apex", "fused", "torch"] = "auto"
    """Adam's update: apex's or PyTorch's fused kernel, or operators one by one."""
    weight_gradient: Literal["auto", "apex", "torch"] = "auto"
    """Weight gradients of linear layers: apex adds each to its float32 sum in the product itself (bf16, ZeRO-1)."""
