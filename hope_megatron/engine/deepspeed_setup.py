"""Importing and configuring DeepSpeed: the one place that knows its quirks.

Measured on 0.19.8; file:line refers to that version.
"""

from __future__ import annotations

import collections
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hope_megatron.config.run import RunConfig
from hope_megatron.engine.distributed import Mesh
from hope_megatron.engine.mpu import ModelParallelUnit
from hope_megatron.layers.memory_mixer import MemoryMixer


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
        "overlap_comm": parallel.overlap_comm and on_gpu,
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


class UpdateQuestion:
    """Whether the update of a step may be made, asked once its gradient norm is known and before anything has changed."""

    def __init__(self) -> None:
        self.norm = math.nan
        """Global gradient norm of the last step, before clipping."""
        self.accept: Callable[[float], bool] = math.isfinite

    def ask(self, norm: float) -> bool:
        """The answer."""
        self.norm = norm
        return self.accept(norm)


_REFUSED = -1.0
"""DeepSpeed's own sign for a norm that is not finite: it drops the gradients, and neither clips nor updates."""


def ask_before_update(zero: Any, stage: int, question: UpdateQuestion) -> None:
    """Have DeepSpeed's wrapper around the optimizer ask before it updates, in its own computation of the norm: stages 1 and 2
    (stage_1_and_2.py:3039), stage 3 (stage3.py:2886), and bf16 at stage 1 (bf16_optimizer.py:389).
    """
    if stage == 0:
        return
    from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors

    def refuses(groups: list[Any]) -> bool:
        norm = float(combine_grad_norm_groups(groups)) / float(getattr(zero, "loss_scale", 1.0))
        return not question.ask(norm)

    def of_stages_1_and_2(*args: Any, **kwargs: Any) -> Any:
        norm = compute(*args, **kwargs)
        return torch.full_like(torch.as_tensor(norm), _REFUSED) if refuses([norm]) else norm

    def of_stage_3(*args: Any, **kwargs: Any) -> Any:
        groups = compute(*args, **kwargs)
        return [torch.full_like(torch.as_tensor(groups[0]), _REFUSED)] if refuses(groups) else groups

    def of_bf16(for_clipping: bool = False) -> Any:
        gradients = compute(for_clipping)
        if for_clipping:
            return gradients
        norm = get_global_norm_of_tensors(input_tensors=gradients[0], mpu=zero.mpu, norm_type=zero.norm_type)
        return ([gradients[0][0].new_full((1,), math.nan)], gradients[1]) if refuses([norm]) else gradients

    name, replacement = {
        "BF16_Optimizer": ("get_grads_for_norm", of_bf16),
        "DeepSpeedZeroOptimizer": ("scaled_global_norm", of_stages_1_and_2),
        "DeepSpeedZeroOptimizer_Stage3": ("_get_norm_groups", of_stage_3),
    }[type(zero).__name__]
    compute = getattr(zero, name)
    setattr(zero, name, replacement)
