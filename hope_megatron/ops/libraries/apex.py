"""NVIDIA's apex: fused RMSNorm, multi-tensor norm, scaling and Adam, and the weight gradient that is added by its product.

Signatures as in apex at 6424da3 (July 2026): apex/normalization/fused_layer_norm.py, csrc/amp_C_frontend.cpp,
csrc/multi_tensor_adam.cu, csrc/megatron/fused_weight_gradient_dense.cpp. Not run on a GPU. Tensors that are not on one go to
PyTorch: apex has no other kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hope_megatron.ops.libraries import pytorch

_ADAM_W, _BIAS_CORRECTION = 1, 1


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See `pytorch.rms_norm`."""
    if not on_gpu(x) or x.dtype != weight.dtype or x.numel() == 0:
        return pytorch.rms_norm(x, weight, epsilon)
    from apex.normalization.fused_layer_norm import FusedRMSNormAffineFunction

    return FusedRMSNormAffineFunction.apply(x, weight, weight.shape, epsilon)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """See `pytorch.Clipping`."""
    if not tensors:
        return torch.zeros(())
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    total, _ = multi_tensor_applier(amp_C.multi_tensor_l2norm, _flag(tensors[0]), [list(tensors)], False)
    return total.reshape(())


def scale(tensors: Sequence[Tensor], factor: float) -> None:
    """See `pytorch.Clipping`."""
    if not tensors:
        return
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    same = list(tensors)
    multi_tensor_applier(amp_C.multi_tensor_scale, _flag(same[0]), [same, same], factor)


CLIPPING = pytorch.Clipping(norm, scale)


def adam_update(
    grad: Tensor, m1: Tensor, v: Tensor, betas: tuple[float, float], epsilon: float, num_updates: int
) -> Tensor:
    """See `pytorch.adam_update`. The kernel steps p by -lr (m / (sqrt(v) + epsilon) + decay p): of p = 0, at a rate of -1 and
    without decay, the update is left."""
    if not on_gpu(grad) or grad.dtype != torch.float32:
        return pytorch.adam_update(grad, m1, v, betas, epsilon, num_updates)
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    update = torch.zeros_like(grad)
    multi_tensor_applier(
        amp_C.multi_tensor_adam, _flag(grad), [[grad], [update], [m1], [v]],
        -1.0, *betas, epsilon, num_updates, _ADAM_W, _BIAS_CORRECTION, 0.0,
    )  # fmt: skip
    return update


def add_weight_gradient(x: Tensor, d_y: Tensor, total: Tensor) -> None:
    """See `pytorch.add_weight_gradient`; without rounding the product first. Megatron-Core's linears call the same function."""
    import fused_weight_gradient_mlp_cuda

    fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x, d_y, total)


def on_gpu(x: Tensor) -> bool:
    """Where the kernels run."""
    return x.is_cuda


def _flag(like: Tensor) -> Tensor:
    """Where the kernels note what is not finite. Nothing here reads it: what is not finite shows in the norm."""
    return torch.zeros(1, dtype=torch.int32, device=like.device)
