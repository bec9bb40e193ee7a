"""What CUDA extensions of libraries compute, in plain PyTorch, with their arguments and what they insist on.

Written from their sources: apex at 6424da3 (csrc/layer_norm_cuda.cpp, multi_tensor_adam.cu, multi_tensor_l2norm_kernel.cu,
multi_tensor_scale_kernel.cu, megatron/fused_weight_gradient_dense_cuda.cu) and causal-conv1d 1.6.1 (csrc/causal_conv1d.cpp). The
Python around the extensions is the library's own where it is installed, and the few lines below where it is not.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F


def apex_modules() -> dict[str, object]:
    """For sys.modules."""
    modules = {
        "amp_C": SimpleNamespace(
            multi_tensor_l2norm=l2norm, multi_tensor_scale=scale, multi_tensor_adam=adam, __spec__=None
        ),
        "fused_layer_norm_cuda": SimpleNamespace(rms_forward_affine=rms_forward, rms_backward_affine=rms_backward),
        "fused_weight_gradient_mlp_cuda": SimpleNamespace(wgrad_gemm_accum_fp32=wgrad_gemm_accum_fp32),
    }
    if importlib.util.find_spec("apex") is None:
        for name in ("apex", "apex.normalization"):
            modules[name] = ModuleType(name)
        modules["apex.normalization.fused_layer_norm"] = SimpleNamespace(FusedRMSNormAffineFunction=_RMSNorm)
        modules["apex.multi_tensor_apply"] = SimpleNamespace(
            multi_tensor_applier=lambda op, flag, lists, *rest: op(2048 * 32, flag, lists, *rest)
        )
    return modules


class _RMSNorm(torch.autograd.Function):
    """apex/normalization/fused_layer_norm.py."""

    @staticmethod
    def forward(ctx, x, weight, normalized_shape, eps, memory_efficient=False):
        ctx.args = normalized_shape, eps, memory_efficient
        y, invvar = sys.modules["fused_layer_norm_cuda"].rms_forward_affine(x, normalized_shape, weight, eps)
        ctx.save_for_backward(x, weight, invvar)
        return y

    @staticmethod
    def backward(ctx, d_y):
        (x, weight, invvar), (shape, *rest) = ctx.saved_tensors, ctx.args
        extension = sys.modules["fused_layer_norm_cuda"]
        return *extension.rms_backward_affine(d_y, invvar, x, shape, weight, *rest), None, None, None


def rms_forward(x, normalized_shape, weight, eps):
    assert x.is_contiguous() and tuple(weight.shape) == tuple(normalized_shape) and x.dtype == weight.dtype
    invvar = (x.float().square().mean(-1) + eps).rsqrt()
    return (x.float() * invvar.unsqueeze(-1) * weight.float()).to(x.dtype), invvar.flatten()


def rms_backward(d_y, invvar, x, normalized_shape, weight, eps, memory_efficient):
    assert d_y.is_contiguous() and not memory_efficient
    r, d = invvar.view(*x.shape[:-1], 1), d_y.float()
    hat = x.float() * r
    d_hat = d * weight.float()
    d_x = r * (d_hat - hat * (d_hat * hat).mean(-1, keepdim=True))
    return d_x.to(x.dtype), (d * hat).flatten(0, -2).sum(0).to(weight.dtype)


def checked(chunk_size, flag, lists, number):
    assert chunk_size > 0 and flag.dtype == torch.int32 and flag.numel() == 1 and len(lists) == number
    assert len({len(tensors) for tensors in lists}) == 1 and lists[0]
    for tensors in zip(*lists):
        assert len({x.numel() for x in tensors}) == 1 and all(x.is_contiguous() for x in tensors)


def l2norm(chunk_size, flag, lists, per_tensor):
    checked(chunk_size, flag, lists, 1)
    assert per_tensor is False
    return torch.cat([x.float().flatten() for x in lists[0]]).norm().reshape(1), torch.empty(0)


def scale(chunk_size, flag, lists, factor):
    checked(chunk_size, flag, lists, 2)
    for source, target in zip(*lists):
        target.copy_(source.float() * float(factor))


def adam(chunk_size, flag, lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, weight_decay):
    checked(chunk_size, flag, lists, 4)
    assert isinstance(step, int) and step > 0 and mode in (0, 1) and bias_correction in (0, 1)
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1, 1)
    for g, p, m, v in zip(*lists):
        assert {x.dtype for x in (g, p, m, v)} == {torch.float32}
        g = g if mode == 1 else g + weight_decay * p
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g * g)
        update = (m / first) / ((v / second).sqrt() + epsilon)
        p.copy_(p - lr * (update + weight_decay * p if mode == 1 else update))


def wgrad_gemm_accum_fp32(x, d_y, main_grad):
    assert x.dim() == d_y.dim() == main_grad.dim() == 2 and main_grad.dtype == torch.float32
    assert x.is_contiguous() and d_y.is_contiguous() and main_grad.is_contiguous()
    main_grad.add_(d_y.float().t().matmul(x.float()))


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """x [B, N, T], weight [N, w], seq_idx [B, T], initial_states [B, N, w - 1]."""
    assert 2 <= weight.size(1) <= 4 and activation == "silu" and bias is None and not return_final_states
    assert x.stride(1) == 1 and x.size(1) % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
    width, T = weight.size(1), x.size(2)
    if seq_idx is not None:
        assert initial_states is None and seq_idx.dtype == torch.int32 and seq_idx.is_contiguous()
        pieces = [F.pad(x, (width - 1 - lag, 0))[..., :T] for lag in range(width)]
        before = [F.pad(seq_idx, (width - 1 - lag, 0), value=-1)[..., :T] for lag in range(width)]
        y = sum(weight[:, j, None] * p * (b == seq_idx).unsqueeze(1) for j, (p, b) in enumerate(zip(pieces, before)))
        return F.silu(y)
    assert initial_states.shape == (x.size(0), x.size(1), width - 1) and initial_states.stride(1) == 1
    assert initial_states.dtype == x.dtype
    return F.silu(F.conv1d(torch.cat([initial_states, x], -1), weight.unsqueeze(1), groups=x.size(1)))
