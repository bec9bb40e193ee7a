"""Choose the libraries of a run's step, and tell the parts that are not asked at each call."""

from __future__ import annotations

from hope_megatron.config.run import RunConfig
from hope_megatron.ops.regions import Region
from hope_megatron.runtime.libraries import Where, choose
from hope_megatron.runtime.step_parts import STEP_PARTS, uses


def choose_libraries(config: RunConfig, device: str, *, elsewhere: bool = False) -> None:
    """Before the model is built.

    Args:
        device: type of the device.
        elsewhere: see `Where`.

    Raises:
        LibraryError: a library that `training.libraries` names cannot serve.
    """
    choose(STEP_PARTS, config.training.libraries.model_dump(), where_of(config, device, elsewhere=elsewhere))
    Region.compiles = uses("pointwise", "compile")


def where_of(config: RunConfig, device: str, *, elsewhere: bool = False) -> Where:
    """What the choices of a run depend on."""
    model, parallel, training = config.model, config.parallel, config.training
    ranks = parallel.tensor_parallel * parallel.context_parallel
    return Where(
        device,
        precision=training.precision,
        zero_stage=parallel.zero_stage,
        cpu_offload=parallel.cpu_offload,
        learns_in_context=model.cms.learns_in_context,
        deterministic=training.deterministic,
        conv_taps=model.memory.conv_width,
        conv_channels=3 * model.num_heads * model.head_dim // ranks if "memory" in model.mixers else 0,
        elsewhere=elsewhere,
    )
