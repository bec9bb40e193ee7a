"""A model in this process alone, with weights from files: for evaluation, decoding and checks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.config.model import ModelConfig
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.model import LanguageModel, build_model
from hope_megatron.optim import merge_shards, read_tags
from hope_megatron.parallel.distributed import init_distributed


def build_local_model(config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], source: str) -> LanguageModel:
    """Build a float32 model on this process's device, load its weights, and put it into eval mode.

    Args:
        config: the architecture.
        tensors: every parameter by name, whole.
        source: where they come from, for messages.

    Raises:
        ConversionError: a tensor is missing, left over, or of another shape.
    """
    model, device = _build(config)
    load_weights(model, tensors, source)
    return model.to(device).eval()


def build_from_shards(config: ModelConfig, tensors: Iterable[tuple[str, list[Tensor]]], source: str) -> LanguageModel:
    """The same from the shards of all tensor-parallel ranks, which the model's tags put together."""
    model, device = _build(config)
    parameters = dict(model.named_parameters())

    def merge(name: str, shards: list[Tensor]) -> Tensor:
        if name not in parameters:
            return shards[0]  # load_weights says what is wrong
        tags = read_tags(parameters[name], name, parameters[name].shape)
        if tags.partition_dim is None and any(not torch.equal(shard, shards[0]) for shard in shards):
            raise ConversionError(f"{source}: tensor-parallel ranks differ in {name}, which they should share")
        return merge_shards(shards, tags)

    load_weights(model, ((name, merge(name, shards)) for name, shards in tensors), source)
    return model.to(device).eval()


def _build(config: ModelConfig) -> tuple[LanguageModel, torch.device]:
    parallel = ParallelConfig()
    mesh = init_distributed(parallel, num_threads=torch.get_num_threads())
    return build_model(config, parallel, dtype=torch.float32), mesh.device


def load_weights(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Copy tensors into the parameters of `model`; each name and shape must match, and none may be left over.

    Args:
        model: a model on one tensor-parallel rank, whose parameters are whole.
        tensors: names and tensors; dtypes are converted to the model's.
        source: where they come from, for messages.
    """
    parameters = dict(model.named_parameters())
    missing = dict.fromkeys(parameters)
    for name, tensor in tensors:
        if name not in parameters:
            raise ConversionError(
                f"{source} holds the tensor {name}, which the model of its configuration does not have"
            )
        if tensor.shape != parameters[name].shape:
            raise ConversionError(
                f"{source}: {name} has shape {list(tensor.shape)}, its configuration makes "
                f"{list(parameters[name].shape)}"
            )
        parameters[name].data.copy_(tensor)
        missing.pop(name, None)
    if missing:
        raise ConversionError(
            f"{source} lacks {len(missing)} tensors of its configuration, the first is {next(iter(missing))}"
        )
