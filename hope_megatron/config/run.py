"""A whole run, and the checks that need more than one section."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import Field, model_validator

from hope_megatron.config.base import ConfigError, Section
from hope_megatron.config.layout import ParallelLayout
from hope_megatron.config.model import ModelConfig
from hope_megatron.config.optim import OptimConfig
from hope_megatron.config.optimizers import OPTIMIZERS
from hope_megatron.config.parallel import ParallelConfig
from hope_megatron.config.resilience import ResilienceConfig
from hope_megatron.config.training import CheckpointConfig, DataConfig, TrackingConfig, TrainingConfig

HAVE_MOMENTUM = ("m3", "muon", "adamuon", "adamw", "sgd", "dgd", "delta_momentum")
"""Optimizers whose state of a matrix has a momentum m1."""


class RunConfig(Section):
    """Everything `hope train` needs."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its directory."""
    output_dir: Path = Field(default=Path("runs"), validate_default=False)
    """The run lives in output_dir/name."""
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig = OptimConfig()
    training: TrainingConfig
    data: DataConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    resilience: ResilienceConfig = ResilienceConfig()

    @property
    def run_dir(self) -> Path:
        """Directory of the run."""
        return self.output_dir / self.name

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        check_parallel_fits_model(self.model, self.parallel, self.training)
        check_inner_clocks(self.model, self.parallel, self.training)
        if self.model.attention.segment_tokens:
            check_segments(self.model, self.parallel, self.training, self.data)
        adaptive = any(level.update_period_adaptive for level in self.model.cms.levels)
        if adaptive and self.optim.name not in HAVE_MOMENTUM:
            raise ConfigError(
                f"update_period_adaptive of a CMS level compares gradients with a momentum, which optim.name={self.optim.name} "
                f"does not keep; choose one of {', '.join(HAVE_MOMENTUM)}, or leave it out"
            )
        windowed = self.training.truncate_tokens not in (None, self.training.seq_length)
        if self.data.reset_at_documents and (windowed or self.model.cms.learns_in_context):
            raise ConfigError(
                "data.reset_at_documents=true reads every sequence in one piece, without a state to carry on; it does not go "
                "with training.truncate_tokens or with inner clocks in the CMS. Set it to false, or leave those out"
            )
        if self.parallel.zero_stage == 0 and self.training.precision == "bf16":
            raise ConfigError(
                "parallel.zero_stage=0 with training.precision=bf16 computes a wrong gradient norm in DeepSpeed; "
                "set zero_stage=1, or precision=fp32"
            )
        if self.training.reduction == "canonical":
            check_canonical(self.parallel, self.training)
        if self.model.mup and not OPTIMIZERS[self.optim.name].scales_with_width:
            known = ", ".join(name for name, entry in OPTIMIZERS.items() if entry.scales_with_width)
            raise ConfigError(
                f"model.mup has no learning-rate rule for optim.name={self.optim.name}, whose updates shrink with the "
                f"gradients; choose one of {known}, or remove model.mup"
            )
        if self.checkpoint.keep_best:
            check_checkpoints_are_evaluated(self.checkpoint, self.training, self.data)
        if self.optim.warmup_steps > self.training.steps:
            raise ConfigError(
                f"optim.warmup_steps={self.optim.warmup_steps} is longer than training.steps={self.training.steps}; lower it"
            )
        return self

    def tokens_at_once(self, *, training: bool) -> int:
        """Tokens of a sequence that the model reads at once: a segment of its inner clocks, a window in training, or all."""
        if self.model.cms.learns_in_context:
            return self.model.cms.inner_segment_tokens
        return (self.training.truncate_tokens if training else None) or self.training.seq_length

    def data_parallel(self, world_size: int) -> int:
        """Data-parallel size in a world of `world_size` ranks.

        Raises:
            ConfigError: if the world, the mesh and the batch do not divide.
        """
        group = self.parallel.ranks_per_sequence
        if world_size % group:
            raise ConfigError(
                f"world size {world_size} is not divisible by {self.parallel.group_in_words}; start a multiple of {group} processes"
            )
        dp = world_size // group
        per_pass = dp * self.training.micro_batch_size
        if self.training.global_batch_size % per_pass:
            raise ConfigError(
                f"training.global_batch_size={self.training.global_batch_size} is not divisible by data parallel {dp} x "
                f"micro_batch_size {self.training.micro_batch_size} = {per_pass}; change one of them"
            )
        return dp

    def layout(self, world_size: int) -> ParallelLayout:
        """How a world of `world_size` ranks is arranged.

        Raises:
            ConfigError: as for `data_parallel`.
        """
        parallel = self.parallel
        return ParallelLayout(
            parallel.tensor_parallel,
            self.replicas(world_size),
            parallel.zero_stage,
            parallel.sequence_parallel,
            parallel.context_parallel,
        )

    def replicas(self, world_size: int) -> int:
        """Ranks over which gradients are summed and ZeRO shards: those of data and of context parallelism. Checkpoints know
        only these.

        Raises:
            ConfigError: as for `data_parallel`.
        """
        return self.data_parallel(world_size) * self.parallel.context_parallel

    def accumulation_steps(self, world_size: int) -> int:
        """Forward-backward passes per optimizer step."""
        return self.training.global_batch_size // (self.data_parallel(world_size) * self.training.micro_batch_size)


def check_canonical(parallel: ParallelConfig, training: TrainingConfig) -> None:
    """Refuse the canonical reduction where its order is not defined."""
    micro_batches = training.global_batch_size / training.micro_batch_size
    sharded = parallel.zero_stage and (parallel.zero_stage > 1 or training.precision != "fp32")
    if sharded or parallel.context_parallel > 1 or not math.log2(micro_batches).is_integer():
        raise ConfigError(
            f"training.reduction=canonical with zero_stage={parallel.zero_stage}, precision={training.precision}, "
            f"context_parallel={parallel.context_parallel} and {micro_batches:g} micro-batches per step; "
            "it needs zero_stage=0 (or 1 in fp32), context_parallel=1, and a number of micro-batches that is a power of two"
        )


def check_checkpoints_are_evaluated(checkpoint: CheckpointConfig, training: TrainingConfig, data: DataConfig) -> None:
    """Refuse to keep the best checkpoints where none has a held-out loss."""
    if data.heldout is None:
        raise ConfigError(
            f"checkpoint.keep_best={checkpoint.keep_best} needs held-out data to judge by; set data.heldout, or keep_best=0"
        )
    if training.eval_every == 0 or checkpoint.every % training.eval_every:
        raise ConfigError(
            f"checkpoint.keep_best={checkpoint.keep_best}: checkpoints every {checkpoint.every} steps have no held-out loss "
            f"with training.eval_every={training.eval_every}; set eval_every to {checkpoint.every} or a divisor of it"
        )


def check_parallel_fits_model(model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> None:
    """Refuse a mesh that does not divide the model, naming every value."""
    tp = parallel.tensor_parallel
    divided = {"model.num_heads": model.num_heads, "padded vocabulary": model.padded_vocab_size}
    divided |= {f"model.cms.levels[{i}].hidden_size": level.hidden_size for i, level in enumerate(model.cms.levels)}
    if "attention" in model.mixers and model.attention.num_kv_heads:
        divided["model.attention.num_kv_heads"] = model.attention.num_kv_heads
    for name, value in divided.items():
        if value % tp:
            raise ConfigError(f"{name}={value} is not divisible by parallel.tensor_parallel={tp}; change one of them")
    check_context_parallel(model, parallel, training)
    if parallel.sequence_parallel and training.seq_length % tp:
        raise ConfigError(
            f"training.seq_length={training.seq_length} is not divisible by parallel.tensor_parallel={tp}, "
            f"which sequence parallelism needs; use a multiple of {tp}"
        )
    if "memory" in model.mixers:
        longest = max(model.memory.chunk_tokens, model.memory.self_chunk)
        if training.seq_length % longest and training.seq_length > longest:
            raise ConfigError(
                f"training.seq_length={training.seq_length} is not a multiple of the memory chunk of {longest} tokens; "
                f"use {training.seq_length // longest * longest} or {(training.seq_length // longest + 1) * longest}"
            )


def check_context_parallel(model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> None:
    """Refuse to split sequences where heads or tokens do not divide."""
    cp, tp = parallel.context_parallel, parallel.tensor_parallel
    if cp == 1:
        return
    heads = {"model.num_heads": model.num_heads}
    if "attention" in model.mixers and model.attention.num_kv_heads:
        heads["model.attention.num_kv_heads"] = model.attention.num_kv_heads
    for name, value in heads.items():
        if value % (tp * cp):
            raise ConfigError(
                f"{name}={value} is not divisible by parallel.tensor_parallel={tp} x context_parallel={cp}: inside a mixer every "
                "rank has whole sequences of its own heads; lower one of them, or train in windows (training.truncate_tokens). "
                "hope rehearse --pass-states N says what passing states from rank to rank would cost"
            )
    window, slices = training.truncate_tokens or training.seq_length, cp * (tp if parallel.sequence_parallel else 1)
    if window % slices:
        raise ConfigError(
            f"{window} tokens that are read at once (training.seq_length, truncate_tokens) do not divide into {slices} slices "
            f"(parallel.context_parallel{' x tensor_parallel' if slices > cp else ''}); use a multiple of {slices}"
        )
    if model.cms.learns_in_context and (model.cms.inner_segment_tokens % slices or window % slices):
        raise ConfigError(
            f"the fastest inner_chunk_tokens={model.cms.inner_segment_tokens} does not divide into {slices} slices "
            f"(parallel.context_parallel{' x tensor_parallel' if slices > cp else ''}), over which each chunk is split; use a "
            f"multiple of {slices}"
        )


def check_segments(model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig, data: DataConfig) -> None:
    """Refuse what segments that are read one after the other cannot have."""
    segment = model.attention.segment_tokens or 0
    for name, value, wanted in (
        ("parallel.sequence_parallel", parallel.sequence_parallel, False),
        ("parallel.context_parallel", parallel.context_parallel, 1),
        ("data.reset_at_documents", data.reset_at_documents, False),
    ):
        if value != wanted:
            raise ConfigError(
                f"model.attention.segment_tokens={segment} with {name}={value}: a segment reads what the one before has "
                f"written, from the sequence's start; set {name}={str(wanted).lower()}"
            )
    if training.seq_length <= segment:
        raise ConfigError(
            f"model.attention.segment_tokens={segment} with training.seq_length={training.seq_length}: no memory would ever be "
            f"read; set segment_tokens to at most {max(1, training.seq_length // 2)}, or longer sequences"
        )


def check_inner_clocks(model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig) -> None:
    """Refuse truncation and parallelism that do not fit the clocks inside the context."""
    window = training.truncate_tokens or training.seq_length
    if training.seq_length % window:
        raise ConfigError(
            f"training.truncate_tokens={window} does not divide training.seq_length={training.seq_length}; change one of them"
        )
    tp = parallel.tensor_parallel
    if parallel.sequence_parallel and window % tp:
        raise ConfigError(
            f"training.truncate_tokens={window} is not divisible by parallel.tensor_parallel={tp}, which sequence "
            f"parallelism needs; use a multiple of {tp}"
        )
    if not model.cms.learns_in_context:
        return
    if parallel.zero_stage == 3:
        raise ConfigError(
            "parallel.zero_stage=3 frees weights after use, and learning in context needs them again; use zero_stage 1 or 2"
        )
    segment = model.cms.inner_segment_tokens
    if parallel.sequence_parallel and segment % tp:
        raise ConfigError(
            f"the fastest inner_chunk_tokens={segment} is not divisible by parallel.tensor_parallel={tp}, which sequence "
            f"parallelism needs; use a multiple of {tp}"
        )
    if window != training.seq_length and window % segment:
        raise ConfigError(
            f"training.truncate_tokens={window} is not a multiple of the fastest inner_chunk_tokens={segment}; change one of them"
        )
    for i, level in enumerate(model.cms.levels):
        if level.ticks and level.inner_rate_kind != "constant" and window < 2 * (level.inner_chunk_tokens or 0):
            raise ConfigError(
                f"model.cms.levels[{i}].inner_rate_kind={level.inner_rate_kind} learns from the chunk after an update, but "
                f"backpropagation spans only {window} tokens (training.seq_length, truncate_tokens) and a chunk "
                f"{level.inner_chunk_tokens}; make it at least two chunks, or set inner_rate_kind=constant"
            )
