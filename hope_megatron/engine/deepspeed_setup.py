"""Importing and configuring DeepSpeed: the one place that knows its quirks.

Measured on 0.19.8; file:line refers to that version.
"""

from __future__ import annotations

import collections
import contextvars
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hope_megatron.config.run import RunConfig
from hope_megatron.engine.gradient_sums import add_to_sums
from hope_megatron.engine.mpu import ModelParallelUnit
from hope_megatron.engine.overlap import wants_overlap
from hope_megatron.layers.memory_mixer import MemoryMixer
from hope_megatron.parallel.distributed import Mesh
from hope_megatron.parallel.question import UpdateQuestion


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, for the device at hand, without its builds: a collective for inference would cost 20-50 s."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed asks this table whether to compile its shared-memory collective (comm/torch.py:49), and fills it by running
    # compilers (ops/__init__.py:16). We use none of its compiled operators, so the table says no, unasked.
    deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
    # It prints memory figures, three lines per parameter group, and forgets the device's peak (runtime/utils.py:828).
    import deepspeed.runtime.bf16_optimizer

    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None
    return deepspeed


def static_loss_scaler() -> Any:
    """What DeepSpeed's ZeRO wrappers save as their loss scaler in float32 and bf16, where nothing is scaled."""
    import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    return LossScaler(scale=1.0)


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run. Schedules and logging are ours, so none of DeepSpeed's are switched on."""
    parallel, training = config.parallel, config.training
    on_gpu = torch.cuda.is_available()
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "overlap_comm": wants_overlap(parallel, "cuda" if on_gpu else "cpu"),
        "contiguous_gradients": on_gpu,
        # M3 finds whole matrices by their place in the flat vectors, in model order.
        "round_robin_gradients": False,
    }
    if parallel.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps(world_size),
        # At stage 0 the engine clips: DeepSpeed's own clipping there neither reports the norm nor stops at NaN.
        "gradient_clipping": config.optim.grad_clip if parallel.zero_stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
    if training.precision == "bf16":
        # A refused gradient is dropped before the step, on all ranks, only with check_grad_overflow.
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = parallel.reduce_dtype
    return settings


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, mesh: Mesh) -> Any:
    """A DeepSpeed engine around a model and a client optimizer."""
    deepspeed = import_deepspeed()
    # It insists, even in a world of one, and takes it for the number of the GPU.
    os.environ["LOCAL_RANK"] = str(mesh.local_rank if mesh.device.index is None else mesh.device.index)
    for module in model.modules():
        if isinstance(module, MemoryMixer):
            # ZeRO-3 frees a module's parameters when its forward returns. The mixer uses those of its memories after
            # that, so they are gathered and freed with the mixer as a whole.
            deepspeed.utils.set_z3_leaf_module(module, True)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config(config, mesh.world_size),
        mpu=ModelParallelUnit(),
        dist_init_required=False,
    )
    return engine


_REFUSED = -1.0
"""DeepSpeed's own sign for a norm that is not finite: it drops the gradients, and neither clips nor updates."""


def ask_before_update(zero: Any, stage: int, question: UpdateQuestion) -> None:
    """Have DeepSpeed's wrapper around the optimizer ask before it updates, in its own computation of the norm: stages 1 and 2
    (stage_1_and_2.py:3039), stage 3 (stage3.py:2886), and bf16 at stage 1 (bf16_optimizer.py:389).

    It goes on with the norm as a number of the host, so that neither its checks nor its clipping wait for the device again.
    """
    if stage == 0:
        return
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.utils import combine_grad_norm_groups

    def answer(norm: Any) -> float:
        return question.norm if question.ask(norm) else _REFUSED

    if isinstance(zero, bf16_optimizer.BF16_Optimizer):
        _ask_in_place_of(bf16_optimizer, zero, answer)
        return
    if zero.__class__.__name__ == "DeepSpeedZeroOptimizer_Stage3":
        compute_groups = zero._get_norm_groups
        zero._get_norm_groups = lambda: [torch.tensor(answer(combine_grad_norm_groups(compute_groups())))]
    else:
        zero.global_norm = zero.scaled_global_norm
        zero.check_overflow = lambda *args, **kwargs: None  # a wait for what the norm says too: it is not finite then
        zero.scaled_global_norm = lambda *args, **kwargs: torch.tensor(answer(zero.global_norm(*args, **kwargs)))


def give_gradients(zero: Any, norm: torch.Tensor) -> None:
    """Have DeepSpeed's float32 wrapper at stages 1 and 2 step with the gradients in `parameter.grad`, reduced and whole on
    each rank, as if it had reduced them itself (stage_1_and_2.py:1073). `norm`: theirs; its own depends on the number of ranks.
    """
    for group, parameters in enumerate(zero.params_in_partition):
        zero.all_grad_tensors[group] = [parameter.grad for parameter in parameters]
        zero.averaged_gradients[group] = zero.get_flat_partition(
            parameters,
            zero.first_offset[group],
            zero.partition_size[group],
            dtype=zero.gradient_accumulation_dtype,
            device=norm.device,
            param_group_idx=group,
            return_tensor_list=True,
        )
        zero.all_grad_tensors[group] = None
    zero.global_norm = lambda *args, **kwargs: norm


def accumulate_together(zero: Any) -> None:
    """Have the bf16 wrapper add gradients to its float32 sums many at a time, and drop them then. It takes two kernels for each
    parameter and micro-batch otherwise (bf16_optimizer.py:519), and a third where autograd adds the next gradient to zeros. The
    sums are the same, bit for bit.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if not isinstance(zero, BF16_Optimizer) or zero.immediate_grad_update:
        return

    def update_hp_grads(clear_lp_grads: bool = False) -> None:
        for group, parameters in enumerate(zero.bf16_groups):
            add_to_sums(zero, group, range(len(parameters)))

    zero.update_hp_grads = update_hp_grads


_answer: contextvars.ContextVar[Callable[[Any], float] | None] = contextvars.ContextVar(
    "answer to a norm", default=None
)


def _ask_in_place_of(module: Any, zero: Any, answer: Callable[[Any], float]) -> None:
    """The bf16 wrapper computes its norm by a function of its module, once a step."""
    if not hasattr(module.get_global_norm_of_tensors, "asks"):
        compute = module.get_global_norm_of_tensors

        def asking(*args: Any, **kwargs: Any) -> Any:
            norm, answer = compute(*args, **kwargs), _answer.get()
            return norm if answer is None else answer(norm)

        asking.asks = True  # type: ignore[attr-defined]
        module.get_global_norm_of_tensors = asking
    step = zero.step

    def asking_step(*args: Any, **kwargs: Any) -> Any:
        token = _answer.set(answer)
        try:
            return step(*args, **kwargs)
        finally:
            _answer.reset(token)

    zero.step = asking_step
