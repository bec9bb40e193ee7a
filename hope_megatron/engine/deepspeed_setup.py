"""Importing and configuring DeepSpeed: the one place that knows its quirks.

Measured on 0.19.8; file:line refers to that version.
"""

from __future__ import annotations

import collections
import logging
import os
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
        # A gradient that is not finite is refused before the step, on all ranks, only with check_grad_overflow.
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, mesh: Mesh) -> Any:
    """A DeepSpeed engine around a model and a client optimizer."""
    deepspeed = import_deepspeed()
    os.environ.setdefault("LOCAL_RANK", str(mesh.local_rank))  # it insists, even in a world of one
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
