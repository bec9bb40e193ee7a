"""Ways to share a sequence between GPUs: what each would send, and what passing states from rank to rank would cost.

Built is the exchange of tokens for heads (docs/parallelism.md). The others are closed forms: ring attention (Liu et al., 2023,
arXiv 2310.01889) and Ulysses (Jacobs et al., 2023, arXiv 2309.14509) for attention of the same width; and memories that go over a
rank's slice of the tokens and hand their states to the next rank, which needs no heads to divide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hope_megatron.config.accounting import weight_table
from hope_megatron.config.base import ConfigError
from hope_megatron.config.hardware import Hardware
from hope_megatron.config.model import ModelConfig
from hope_megatron.config.roofline import PhaseTime, Transfer, transfer_seconds
from hope_megatron.config.run import RunConfig


def attention_exchanges(config: RunConfig) -> dict[str, float]:
    """Bytes that a rank sends per token of its slice, layer and forward pass, for attention of the model's width."""
    model, cp, tp = config.model, config.parallel.context_parallel, config.parallel.tensor_parallel
    number = 2 if config.training.precision == "bf16" else 4
    queries = model.num_heads * model.head_dim / tp
    keys = (model.attention.num_kv_heads if "attention" in model.mixers else None) or model.num_heads
    keys_and_values = 2 * keys * model.head_dim / tp
    return {
        "ulysses": number * (2 * queries + keys_and_values) * (cp - 1) / cp,
        "ring attention": number * keys_and_values * (cp - 1),
    }


def state_bytes(model: ModelConfig) -> float:
    """Bytes of the state of one stream over all memory layers, at a border of chunks: weights and momentum in float32, and the
    last inputs of the convolutions."""
    memory, layers = model.memory, model.mixers.count("memory")
    weights = sum(row.total for row in weight_table(model) if row.part == "memories")
    tail = (memory.conv_width - 1) * 3 * model.num_heads * model.head_dim * layers
    return 4.0 * (weights * (1 if memory.momentum == "none" else 2) + tail)


def slice_config(config: RunConfig, ranks: int) -> RunConfig:
    """The run as each of `ranks` ranks of a sequence would compute it if states were passed: sequences as long as a slice, as many
    more of them.

    Raises:
        ConfigError: if tokens do not divide into chunks of slices, or a layer is none that hands on a state of constant size.
    """
    model, training = config.model, config.training
    if set(model.mixers) != {"memory"}:
        raise ConfigError(
            "--pass-states: states are those of memories; this model has attention, which needs all keys and values (see ring "
            "attention in what hope rehearse prints under context parallelism)"
        )
    window, chunk = (
        training.truncate_tokens or training.seq_length,
        max(model.memory.chunk_tokens, model.memory.self_chunk),
    )
    if ranks < 2 or window % (ranks * chunk):
        raise ConfigError(
            f"--pass-states {ranks}: {window} tokens that are read at once do not divide into slices of whole chunks of {chunk} "
            f"for {ranks} ranks; give at least 2, and a divisor of {window // chunk}"
        )
    changed = {
        "seq_length": training.seq_length // ranks,
        "truncate_tokens": None if training.truncate_tokens is None else training.truncate_tokens // ranks,
        "global_batch_size": training.global_batch_size * ranks,
    }
    return config.model_copy(
        update={
            "training": training.model_copy(update=changed),
            "parallel": config.parallel.model_copy(update={"context_parallel": 1}),
        }
    )


def passing_states(
    config: RunConfig, ranks: int, phases: Mapping[str, PhaseTime], hardware: Hardware, world_size: int
) -> dict[str, Any]:
    """What passing states over `ranks` ranks would add to a step whose other work is that of `slice_config`.

    A layer of a rank waits for the layer's state from the rank before, so ranks start one layer after the other: (ranks - 1) layers
    of a slice in each forward pass, and as many in each backward pass, where gradients of states come back. Passes follow each
    other. What is recomputed begins at states that were kept, and waits for nobody.

    Args:
        config: that of the slices.
        ranks: of a sequence.
        phases: times of its step.
        hardware: whose links states travel over.
        world_size: number of all ranks.
    """
    model, training, tp = config.model, config.training, config.parallel.tensor_parallel
    passes = config.accumulation_steps(world_size) * (
        training.seq_length // (training.truncate_tokens or training.seq_length)
    )
    each = training.micro_batch_size * state_bytes(model) / tp
    hop = Transfer(
        "forward", "broadcast", "context parallel", tuple(range(0, ranks * tp, tp)), 1, each / model.num_layers, False
    )
    hops = 2 * passes * (ranks - 1) * transfer_seconds(hop, hardware)
    serial = hops + (ranks - 1) / model.num_layers * (phases["forward"].total + phases["backward"].total)
    step = sum(phase.total for phase in phases.values()) + serial
    return {
        "ranks": ranks,
        "state_bytes": each,
        "bytes_per_step": 2 * passes * each,
        "serial_s": serial,
        "step_s": step,
        "tokens_per_second": training.tokens_per_step / world_size / step,
    }
