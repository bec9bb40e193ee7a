"""Take the path that a GPU would take: on fake CPU tensors PyTorch and the project would choose what suits a CPU.

Kernels that only a GPU has are counted by what they read and write and by what they keep for backward; what they compute is left
out. Those are PyTorch's fused norms and attention, and the regions that torch.compile makes one kernel of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import layers
from torch import Tensor

from hope_megatron.config.run import RunConfig
from hope_megatron.engine import engine, new_engine, overlap
from hope_megatron.engine.libraries import choose_libraries
from hope_megatron.engine.policy import matmul_precision, policy_restored
from hope_megatron.ops.libraries import flex
from hope_megatron.ops.memory import operator
from hope_megatron.ops.memory.backends.registry import Case
from hope_megatron.ops.regions import Region
from hope_megatron.optim import exchange, new_optimizer
from hope_megatron.rehearse.operators import Family, tensors_in
from hope_megatron.rehearse.triton_launches import TritonLaunches
from hope_megatron.rehearse.watch import Watch
from hope_megatron.runtime.libraries import choices_restored

_HALF = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def gpu_path(watch: Watch, config: RunConfig) -> Iterator[None]:
    """Choose as a GPU would, for a while."""
    stand_ins = _StandIns(watch)
    with contextlib.ExitStack() as stack, TritonLaunches(watch, config.model) as triton:
        stack.enter_context(policy_restored())
        stack.enter_context(choices_restored())
        stack.enter_context(patch.object(Region, "compiles", Region.compiles))
        stack.enter_context(patch.object(new_engine, "choose_libraries", _as_on_a_gpu))
        stack.enter_context(
            patch.object(engine, "wants_overlap", lambda parallel, _: overlap.wants_overlap(parallel, "cuda"))
        )
        stack.enter_context(patch.object(overlap.OverlappedReduction, "send", _watched_send(watch)))
        torch.set_float32_matmul_precision(matmul_precision(config.training))
        stack.enter_context(patch.object(new_optimizer, "device_type", lambda named_parameters: "cuda"))
        stack.enter_context(_memories_on("cuda"))
        stack.enter_context(patch.object(operator, "choose", triton.choose))
        stack.enter_context(patch.object(F, "rms_norm", stand_ins.rms_norm))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", stand_ins.attention))
        stack.enter_context(patch.object(Region, "runner", staticmethod(stand_ins.region)))
        stack.enter_context(patch.object(flex, "compute", stand_ins.flex))
        stack.enter_context(patch.object(flex, "_blocks", lambda T, S, window, device: min(window or S, S)))
        stack.enter_context(patch.object(layers, "fused_weight_gradient_mlp_cuda", stand_ins, create=True))
        stack.enter_context(patch.object(exchange, "_MAX_BATCH_NUMEL_CPU", exchange.MAX_BATCH_NUMEL))
        yield


def _as_on_a_gpu(config: RunConfig, device: str) -> None:
    choose_libraries(config, "cuda", elsewhere=True)


def _watched_send(watch: Watch) -> Callable[..., None]:
    """Sending a bucket of gradients from within backward, told from backward itself."""
    send = overlap.OverlappedReduction.send

    def watched(self: Any, bucket: Any, *, hidden: bool) -> None:
        phase, watch.phase, watch.overlapping = watch.phase, "reduction", hidden
        try:
            send(self, bucket, hidden=hidden)
        finally:
            watch.phase, watch.overlapping = phase, False

    return watched


def cpu_path() -> contextlib.AbstractContextManager[None]:
    """Run the memories through PyTorch's operators, which can be watched, for a while."""
    return _memories_on("cpu")


@contextlib.contextmanager
def _memories_on(device: str) -> Iterator[None]:
    """Choose the memories' backend as on a device of this type; never compiled code, which cannot be watched."""

    class CaseThere(Case):
        @classmethod
        def of(cls, *args: Any) -> Case:
            return Case.of(*args)._replace(device=device, plain=False)

    with patch.object(operator, "Case", CaseThere):
        yield


class _StandIns:
    """Functions in the place of kernels that only a GPU has."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def rms_norm(self, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        """One kernel that keeps its input and a root per row; backward one for x and one for the weight."""
        roots = lambda: x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)  # noqa: E731
        inputs = (x,) if weight is None else (x, weight)
        return self._kernel("rms_norm", "norms", inputs, lambda: torch.empty_like(x), roots, backward_kernels=2)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """FlashAttention in half precision without a mask; else the memory-efficient kernel, which reads the mask as a bias and
        wants shared heads repeated. Either writes [B, T, heads, d] and keeps q, k, v, its output and a number per row."""
        flash = query.dtype in _HALF and attn_mask is None and query.size(-1) <= 256
        if enable_gqa and not flash:
            key, value = (x.repeat_interleave(query.size(-3) // x.size(-3), -3) for x in (key, value))
        inputs = [query, key, value]
        if attn_mask is not None:
            shape = (*query.shape[:-1], key.size(-2))
            bias = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
            inputs.append(bias.masked_fill(attn_mask.logical_not(), float("-inf")).expand(shape))
        products = 2 * query.numel() * key.size(-2) * (0.5 if is_causal else 1)
        return self._kernel(
            "flash_attention" if flash else "efficient_attention",
            "attention",
            tuple(inputs),
            lambda: torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2),
            lambda: query.new_empty(query.shape[:-1], dtype=torch.float32),
            backward_kernels=3 if flash else 2,
            flops=(2 * products, 5 * products),
            keeps_output=True,
        )

    def flex(self, query: Tensor, key: Tensor, value: Tensor, seen: int) -> Tensor:
        """flex_attention under a window: as FlashAttention, over the blocks that a query sees."""
        products = 2 * query.numel() * seen
        return self._kernel(
            "flex_attention",
            "attention",
            (query, key, value),
            lambda: torch.empty_like(query),
            lambda: query.new_empty(query.shape[:-1], dtype=torch.float32),
            backward_kernels=2,
            flops=(2 * products, 5 * products),
            keeps_output=True,
        )

    def wgrad_gemm_accum_fp32(self, x: Tensor, d_y: Tensor, total: Tensor) -> None:
        """apex's product that adds to the sum it reads."""
        flops = 2 * d_y.size(1) * x.numel()
        self.watch.count_kernel("wgrad_gemm_accum", "products", [x, d_y, total], [total], flops=flops)

    def region(self, region: Region, args: tuple[Any, ...]) -> Any:
        """One kernel that keeps its inputs."""
        name = getattr(region, "__name__", "region")
        tensors = tensors_in(list(args), [])
        family: Family = "copies" if name == "copy" else "pointwise"
        return self._kernel(
            name, family, tuple(tensors), lambda: region.function(*args), None, backward_kernels=region.backward_kernels
        )

    def _kernel(
        self,
        name: str,
        family: Family,
        inputs: tuple[Tensor, ...],
        make: Callable[[], Tensor],
        keep: Callable[[], Tensor] | None,
        *,
        backward_kernels: int,
        flops: tuple[float, float] = (0, 0),
        keeps_output: bool = False,
    ) -> Tensor:
        work = _Work(self.watch, name, family, make, keep, backward_kernels, flops, keeps_output)
        return _Kernel.apply(work, *inputs)


class _Work:
    """What a kernel and its backward do."""

    def __init__(
        self,
        watch: Watch,
        name: str,
        family: Family,
        make: Any,
        keep: Any,
        backward_kernels: int,
        flops: Any,
        keeps_output: bool,
    ):
        self.watch, self.name, self.family, self.make, self.keep = watch, name, family, make, keep
        self.backward_kernels, self.flops, self.keeps_output = backward_kernels, flops, keeps_output


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, *inputs: Tensor) -> Tensor:
        with work.watch.hidden():
            output = work.make()
            kept = [] if work.keep is None else [work.keep()]
        work.make = work.keep = None  # they hold operands, which would live until backward, checkpointed or not
        work.watch.count_kernel(work.name, work.family, list(inputs), [output, *kept], flops=work.flops[0])
        if work.keeps_output:
            kept.append(output)
        ctx.save_for_backward(*inputs, *kept)
        ctx.work, ctx.num_inputs = work, len(inputs)
        return output

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        work, saved = ctx.work, list(ctx.saved_tensors)
        with work.watch.hidden():
            gradients = [
                torch.empty_like(x) if needed else None
                for x, needed in zip(saved[: ctx.num_inputs], ctx.needs_input_grad[1:])
            ]
        made = [x for x in gradients if x is not None]
        work.watch.count_kernel(
            f"{work.name}_backward", work.family, [d_output, *saved], made, work.backward_kernels, work.flops[1]
        )
        return None, *gradients
