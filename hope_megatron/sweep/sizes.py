"""Model sizes: a family's model scaled to a width, or to FLOPs per token, keeping its proportions."""

from __future__ import annotations

import math

from hope_megatron.config.accounting import forward_flops
from hope_megatron.config.model import ModelConfig
from hope_megatron.sweep.errors import SweepError
from hope_megatron.sweep.schema import SizesConfig

BACKWARD_AND_FORWARD = 3
"""Training costs three forward passes: backward computes a product per operand."""

CMS_MULTIPLE = 8
"""CMS hidden widths are multiples of this."""

_FLOPS_TOLERANCE = 0.02
_CMS_SCALE_LIMIT = 3.0
_MAX_WIDTH = 1 << 17


def train_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Model FLOPs per trained token, forward and backward; recomputation is not model work."""
    return BACKWARD_AND_FORWARD * forward_flops(model, seq_length).total


def ladder(model: ModelConfig, sizes: SizesConfig, seq_length: int, tensor_parallel: int = 1) -> list[ModelConfig]:
    """The family's model at every size, smallest first.

    Args:
        model: the family's model, whose proportions are kept.
        sizes: the ladder.
        seq_length: tokens per sequence, which FLOPs depend on.
        tensor_parallel: heads and hidden widths stay divisible by it.

    Raises:
        SweepError: if a width cannot be divided into heads, or no width comes near the FLOPs.
    """
    rungs = []
    for i in range(len(sizes.widths or sizes.flops_per_token or ())):
        depth = sizes.depths[i] if sizes.depths else None
        if sizes.widths:
            rungs.append(scale_to_width(model, sizes.widths[i], depth, sizes.head_size, tensor_parallel))
        else:
            assert sizes.flops_per_token is not None
            rungs.append(
                scale_to_flops(model, sizes.flops_per_token[i], seq_length, depth, sizes.head_size, tensor_parallel)
            )
    return rungs


def scale_to_width(
    model: ModelConfig, width: int, depth: int | None = None, head_size: int | None = None, tensor_parallel: int = 1
) -> ModelConfig:
    """The model at another width: heads of the same size, depth and CMS in proportion.

    Args:
        model: the model whose proportions are kept.
        width: hidden_size of the result.
        depth: number of layers; None keeps width / depth.
        head_size: head width; None keeps the model's.
        tensor_parallel: CMS widths are multiples of CMS_MULTIPLE times this.

    Raises:
        SweepError: if the heads do not divide the width.
    """
    head = head_size or model.head_dim
    if width % (head * tensor_parallel):
        raise SweepError(
            f"width {width} is not a multiple of {head * tensor_parallel} (head width {head} x tensor parallel {tensor_parallel}); "
            "change sizes.widths, or set sizes.head_size"
        )
    ratio = width / model.hidden_size
    levels = tuple(
        level.model_copy(update={"hidden_size": _round_to(level.hidden_size * ratio, CMS_MULTIPLE * tensor_parallel)})
        for level in model.cms.levels
    )
    attention = model.attention
    if attention.num_kv_heads:  # as many query heads per key-value head
        group = model.num_heads // attention.num_kv_heads
        attention = attention.model_copy(update={"num_kv_heads": max(1, width // head // group)})
    return model.model_copy(
        update={
            "hidden_size": width,
            "num_heads": width // head,
            "head_size": None,
            "num_layers": depth or max(1, round(model.num_layers * ratio)),
            "attention": attention,
            "cms": model.cms.model_copy(update={"levels": levels}),
        }
    )


def scale_to_flops(
    model: ModelConfig,
    flops_per_token: float,
    seq_length: int,
    depth: int | None = None,
    head_size: int | None = None,
    tensor_parallel: int = 1,
) -> ModelConfig:
    """The model of given training FLOPs per token: a width nearby, and the hidden width of its CMS, changed as little as possible.

    Args:
        flops_per_token: target, forward and backward.
        The others as for `scale_to_width`.

    Raises:
        SweepError: if none comes within 2 %.
    """
    step, multiple = (head_size or model.head_dim) * tensor_parallel, CMS_MULTIPLE * tensor_parallel

    def off(candidate: ModelConfig) -> float:
        return abs(math.log(train_flops_per_token(candidate, seq_length) / flops_per_token))

    candidates = []
    for width in range(step, _MAX_WIDTH, step):
        scaled = scale_to_width(model, width, depth, head_size, tensor_parallel)
        adjusted = _adjust_cms(scaled, flops_per_token, seq_length, multiple)
        change = abs(math.log(adjusted.cms.levels[0].hidden_size / scaled.cms.levels[0].hidden_size))
        candidates.append((off(adjusted) > _FLOPS_TOLERANCE, change, off(adjusted), adjusted))
        if train_flops_per_token(scaled, seq_length) > _CMS_SCALE_LIMIT * flops_per_token:
            break
    too_far, _, _, best = min(candidates, key=lambda candidate: candidate[:3])
    if too_far:
        best = min(candidates, key=lambda candidate: candidate[2])[-1]
        raise SweepError(
            f"no width of {model.name} comes within {_FLOPS_TOLERANCE:.0%} of {flops_per_token:.3g} training FLOPs per token; "
            f"the nearest, width {best.hidden_size} with {best.num_layers} layers, "
            f"takes {train_flops_per_token(best, seq_length):.3g}; "
            "change sizes.flops_per_token, set sizes.depths, or a smaller sizes.head_size or vocabulary"
        )
    return best


def _adjust_cms(model: ModelConfig, flops_per_token: float, seq_length: int, multiple: int) -> ModelConfig:
    """Scale the CMS levels so that the FLOPs, which are linear in their widths, meet the target."""

    def with_scale(scale: float) -> ModelConfig:
        levels = tuple(
            level.model_copy(update={"hidden_size": _round_to(level.hidden_size * scale, multiple)})
            for level in model.cms.levels
        )
        return model.model_copy(update={"cms": model.cms.model_copy(update={"levels": levels})})

    now = train_flops_per_token(model, seq_length)
    of_cms = (train_flops_per_token(with_scale(2.0), seq_length) - now) or 1.0
    scale = 1 + (flops_per_token - now) / of_cms
    return with_scale(min(max(scale, 1 / _CMS_SCALE_LIMIT), _CMS_SCALE_LIMIT))


def _round_to(value: float, multiple: int) -> int:
    return max(multiple, round(value / multiple) * multiple)
