"""The norm of DeepSpeed's bf16 wrapper, and its clipping, over all gradients at once: it takes kernels for each parameter otherwise
(bf16_optimizer.py:390 and 409)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hope_megatron.runtime.step_parts import implementation


def clip_together(zero: Any) -> None:
    """Have the wrapper compute so, if it is the bf16 one. Once for all of a process; before anything else is put in their place."""
    from deepspeed.runtime import bf16_optimizer

    if not isinstance(zero, bf16_optimizer.BF16_Optimizer) or hasattr(bf16_optimizer, "clips_together"):
        return
    bf16_optimizer.clips_together = True
    norm_of_each = bf16_optimizer.get_global_norm_of_tensors

    def norm(input_tensors: Sequence[Tensor], norm_type: float = 2, **kwargs: Any) -> Any:
        """The squares of other ranks, and what is not finite, stay DeepSpeed's."""
        if norm_type == 2 and input_tensors:
            input_tensors = [implementation("clipping").norm(input_tensors)]
        return norm_of_each(input_tensors=input_tensors, norm_type=norm_type, **kwargs)

    def clip(input_tensors: Sequence[Tensor], max_norm: float, global_norm: Any, eps: float = 1e-6, **_: Any) -> Any:
        factor = max_norm / (global_norm + eps)
        if factor < 1 and input_tensors:
            implementation("clipping").scale(input_tensors, factor)
        return global_norm

    bf16_optimizer.get_global_norm_of_tensors = norm
    bf16_optimizer.clip_tensors_by_global_norm = clip
