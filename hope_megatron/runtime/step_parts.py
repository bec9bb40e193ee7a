"""The parts of a training step that libraries have kernels for, and who can compute each, best first.

A new candidate is an adapter in `ops/libraries`, a row here, and its name in `config/libraries.py`. Nothing with `cuda` in its
reasons has been run on a GPU; each is held against PyTorch on the device before a run takes it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from typing import Any

from hope_megatron.runtime.apex import detect_apex
from hope_megatron.runtime.libraries import Candidate, Part, Reason, Where, chosen, load
from hope_megatron.runtime.registry import Registry

_LIBRARIES = "hope_megatron.ops.libraries"
_DEFAULT = "what PyTorch has is rehearsed; a library is counted where it is asked for by name"
_NO_GPU = "there is no CUDA device"


def _first(*reasons: Reason) -> Reason:
    """The first reason of several."""
    return lambda where: next((found for reason in reasons if (found := reason(where)) is not None), None)


def _needs_gpu(where: Where) -> str | None:
    return None if where.device == "cuda" else _NO_GPU


def _not_by_itself(where: Where) -> str | None:
    return _DEFAULT if where.elsewhere else None


def _apex_has(family: str) -> Reason:
    return lambda where: None if where.elsewhere else _apex().lacks(family)


@functools.lru_cache(maxsize=1)
def _apex() -> Any:
    return detect_apex()


def _once_differentiable(where: Where) -> str | None:
    if where.learns_in_context:
        return "it has no second derivative, and this model learns in context"
    return None


def _states_on_device(where: Where) -> str | None:
    return "the optimizer's states are in host memory (parallel.cpu_offload)" if where.cpu_offload else None


def _is_installed(module: str, package: str) -> Reason:
    def why_not(where: Where) -> str | None:
        if where.elsewhere or importlib.util.find_spec(module) is not None:
            return None
        return f"{package} is not installed"

    return why_not


def _compiles(where: Where) -> str | None:
    if where.elsewhere:
        return None
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1" or os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return "torch.compile is turned off by TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE"
    if importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton, which is not installed"
    if not os.environ.get("CC") and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "torch.compile needs a C compiler and there is none: install gcc, or set CC"
    return None


def _conv_shape(where: Where) -> str | None:
    if not where.conv_channels:
        return "this model has no short convolution"
    if not 2 <= where.conv_taps <= 4:
        return f"it takes 2 to 4 taps, not {where.conv_taps}"
    if where.conv_channels % 8:
        return f"it wants channels in eights; a rank has {where.conv_channels}"
    return None


def _any_order(where: Where) -> str | None:
    return "it adds up the gradient of the taps in any order (training.deterministic)" if where.deterministic else None


def _whole_sums(where: Where) -> str | None:
    """Where DeepSpeed keeps a whole float32 sum of the gradients of each weight on each rank."""
    if where.precision == "bf16" and where.zero_stage == 1 and not where.cpu_offload:
        return None
    return "it adds to whole float32 sums, which DeepSpeed keeps in bf16 at ZeRO-1 without offload alone"


def _as_before(where: Where) -> str | None:
    return None if where.device == "cuda" else "on CPUs runs keep the bits of PyTorch's separate operators"


def _by_name(where: Where) -> str | None:
    return "by name only: no GPU has run its backward, and CPUs have none"


_APEX_NORM = Candidate(
    "apex",
    "NVIDIA apex's fused RMSNorm",
    f"{_LIBRARIES}.apex:rms_norm",
    why_not=_first(_needs_gpu, _apex_has("fused norms"), _once_differentiable),
    unwise=_not_by_itself,
    modules=("apex.normalization.fused_layer_norm", "fused_layer_norm_cuda"),
    check=f"{_LIBRARIES}.checks:norm_of_apex",
)


def _apex_multi_tensor(summary: str, name: str, check: str) -> Candidate:
    """What apex does to many tensors by one kernel."""
    return Candidate(
        "apex",
        summary,
        f"{_LIBRARIES}.apex:{name}",
        why_not=_first(_needs_gpu, _apex_has("multi-tensor kernels"), _states_on_device),
        unwise=_not_by_itself,
        modules=("apex.multi_tensor_apply", "amp_C"),
        check=f"{_LIBRARIES}.checks:{check}",
    )


STEP_PARTS: Registry[Part] = Registry(
    "part of a step",
    {
        "norm": Part(
            "RMSNorm",
            (
                _APEX_NORM,
                Candidate("torch", "PyTorch's rms_norm: one kernel on GPUs", f"{_LIBRARIES}.pytorch:rms_norm"),
            ),
            "Liger and Transformer Engine: one kernel forward, as PyTorch's own; Transformer Engine's belongs to its own linears",
        ),
        "pointwise": Part(
            "SwiGLU, rotary embedding, gates, and the inside of the cross entropy",
            (
                Candidate(
                    "compile",
                    "one kernel each by torch.compile",
                    "hope_megatron.ops.regions:Region",
                    why_not=_first(_needs_gpu, _compiles),
                ),
                Candidate("torch", "PyTorch's operators one by one", "hope_megatron.ops.regions:Region"),
            ),
            "Liger's SwiGLU and rotary want gate and up, or queries and keys, in tensors of their own: copies that the compiled "
            "region does not make. Megatron's bias_swiglu is the same torch.compile; its fused rotary calls Transformer Engine",
        ),
        "cross_entropy": Part(
            "loss over a vocabulary that tensor-parallel ranks share",
            (
                Candidate(
                    "own", "keeps no float32 copy of the logits", "hope_megatron.model.loss:vocab_parallel_losses"
                ),
            ),
            "Megatron's, fused or not, keeps float32 exponentials of all logits; Liger's and apex's want the whole vocabulary on "
            "one rank",
        ),
        "short_conv": Part(
            "causal depthwise convolution and SiLU",
            (
                Candidate(
                    "causal_conv1d",
                    "one kernel forward, one backward",
                    f"{_LIBRARIES}.causal_conv1d:convolved",
                    why_not=_first(
                        _needs_gpu,
                        _is_installed("causal_conv1d", "causal-conv1d"),
                        _conv_shape,
                        _any_order,
                        _once_differentiable,
                    ),
                    unwise=_not_by_itself,
                    modules=("causal_conv1d.causal_conv1d_interface",),
                    check=f"{_LIBRARIES}.checks:convolution_of_causal_conv1d",
                ),
                Candidate("torch", "see pointwise", "hope_megatron.ops.short_conv:convolved"),
            ),
        ),
        "attention": Part(
            "softmax attention",
            (
                Candidate(
                    "flex",
                    "PyTorch's flex_attention where there are windows or documents: no explicit mask",
                    f"{_LIBRARIES}.flex:attention",
                    why_not=_first(_needs_gpu, _compiles),
                    unwise=_by_name,
                    check=f"{_LIBRARIES}.checks:attention_of_flex",
                ),
                Candidate(
                    "sdpa",
                    "PyTorch's scaled_dot_product_attention: flash kernels, with an explicit mask the memory-efficient one",
                    f"{_LIBRARIES}.pytorch:attention",
                ),
            ),
            "flash-attn and Transformer Engine: PyTorch has the same flash kernels",
        ),
        "clipping": Part(
            "norm of all gradients, and scaling by it",
            (
                _apex_multi_tensor("multi_tensor_l2norm and multi_tensor_scale", "CLIPPING", "clipping_of_apex"),
                Candidate("torch", "PyTorch's _foreach_norm and _foreach_mul", f"{_LIBRARIES}.pytorch:CLIPPING"),
            ),
            "DeepSpeed's own elsewhere than in bf16 at ZeRO-1 and at ZeRO-0, where it computes the norm itself",
        ),
        "adam": Part(
            "Adam's update of flat vectors: all of AdamW's, and the vectors of the other optimizers",
            (
                _apex_multi_tensor("multi_tensor_adam: one kernel", "adam_update", "adam_of_apex"),
                Candidate(
                    "fused",
                    "PyTorch's fused Adam: one kernel",
                    f"{_LIBRARIES}.pytorch:fused_adam_update",
                    unwise=_as_before,
                ),
                Candidate("torch", "PyTorch's operators one by one", f"{_LIBRARIES}.pytorch:adam_update"),
            ),
            "DeepSpeed's FusedAdam steps parameters itself, not one of ZeRO's flat vectors on this project's clocks",
        ),
        "weight_gradient": Part(
            "gradients of Megatron's linears, over micro-batches",
            (
                Candidate(
                    "apex",
                    "added to the float32 sum by the product itself (Megatron's gradient_accumulation_fusion)",
                    f"{_LIBRARIES}.apex:add_weight_gradient",
                    why_not=_first(_needs_gpu, _apex_has("fused weight gradient"), _whole_sums, _once_differentiable),
                    unwise=_not_by_itself,
                    modules=("fused_weight_gradient_mlp_cuda",),
                    check=f"{_LIBRARIES}.checks:weight_gradient_of_apex",
                ),
                Candidate(
                    "torch",
                    "a bf16 gradient, added to the float32 sum after it",
                    f"{_LIBRARIES}.pytorch:add_weight_gradient",
                ),
            ),
            "Transformer Engine's belongs to its own linears",
        ),
    },
)
"""By the name of the key in `training.libraries`; cross_entropy has no choice."""


def implementation(part: str) -> Any:
    """What computes a part in this process: what was chosen, or what serves everywhere where no run was started."""
    choice = chosen.get(part)
    return load(choice.library.target if choice is not None else STEP_PARTS[part].target)


def uses(part: str, library: str) -> bool:
    """Whether a library was chosen for a part."""
    choice = chosen.get(part)
    return choice is not None and choice.library.name == library
