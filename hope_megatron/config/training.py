"""The training loop, its data, its checkpoints and where metrics go."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from hope_megatron.config.base import ConfigError, Section


class TrainingConfig(Section):
    """How long, how much at once, how precise."""

    steps: int = Field(gt=0)
    """Optimizer steps of the whole run."""
    seq_length: int = Field(gt=0)
    """Tokens per training sequence."""
    global_batch_size: int = Field(gt=0)
    """Sequences per optimizer step, over all ranks and accumulation steps."""
    micro_batch_size: int = Field(default=1, gt=0)
    """Sequences per rank and forward pass."""
    truncate_tokens: int | None = Field(default=None, gt=0)
    """Backpropagation through a sequence is cut every this many tokens, which bounds memory; None: never."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute precision; master weights, memory states and optimizer states are always fp32."""
    seed: int = Field(default=1234, ge=0)
    """Seed of the initial weights."""
    log_every: int = Field(default=10, gt=0)
    """Steps between log lines and metric records."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between held-out evaluations; 0: only at the end."""
    eval_sequences: int = Field(default=64, gt=0)
    """Held-out sequences per evaluation during training."""
    memory_every: int = Field(default=50, ge=0)
    """Steps between measurements of the memories (`memory/*` and `cms/*` in metrics.jsonl), each one more forward pass over
    one training sequence per rank; 0: never."""
    recompute: Literal["none", "memory", "layer"] = "none"
    """What backward recomputes instead of keeping: nothing, the inside of the memories, or that and each whole layer."""
    num_threads: int = Field(default=1, gt=0)
    """CPU threads per process for torch operators, when there is no GPU."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step."""
        return self.seq_length * self.global_batch_size

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.tokens_per_step


class DataConfig(Section):
    """Where token shards are."""

    train: Path
    """Manifest of the training shards, or the directory that holds it."""
    heldout: Path | None = None
    """Manifest of the held-out shards."""
    tokenizer: Path
    """SentencePiece model the shards were made with; its digest is checked against the manifests."""
    seed: int = Field(default=0, ge=0)
    """Seed of the data order."""


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every: int = Field(default=500, gt=0)
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = Field(default=2, gt=0)
    """How many of the newest checkpoints stay."""
    keep_every: int | None = Field(default=None, gt=0)
    """Checkpoints at multiples of this many steps stay forever."""


class TrackingConfig(Section):
    """MLflow, beside the local metrics.jsonl, which is the truth."""

    mlflow: bool = True
    """Feed MLflow."""
    uri: str | None = None
    """Tracking URI; None is a SQLite file, mlflow.db, beside the run directories."""
    experiment: str = "hope"
    """MLflow experiment."""

    @model_validator(mode="after")
    def _check(self) -> TrackingConfig:
        if self.uri is not None and not self.mlflow:
            raise ConfigError("tracking.uri is set but tracking.mlflow=false; remove one of them")
        return self
