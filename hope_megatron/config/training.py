"""The training loop, its data, its checkpoints and where metrics go."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, field_serializer, model_validator
from pydantic_core import PydanticKnownError

from hope_megatron.config.base import ConfigError, Section
from hope_megatron.config.libraries import LibrariesConfig
from hope_megatron.config.secrets import mask_credentials
from hope_megatron.config.trackers import TRACKERS
from hope_megatron.runtime.registry import UnknownNameError


class ProfileConfig(Section):
    """Which steps are profiled, and where."""

    steps: tuple[int, ...] = ()
    """Steps (1 is the first) of which a trace is written, on GPUs with a snapshot of their memory; none: no profile."""
    ranks: tuple[int, ...] = (0,)
    """Ranks that write them."""


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
    float32_products: Literal["tf32", "float32"] = "tf32"
    """How GPUs multiply what stays float32 (the memories, Newton-Schulz in float32): in TF32, or in full. CPUs always in full."""
    libraries: LibrariesConfig = LibrariesConfig()
    """Which library computes each part of a step."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time, on GPUs too: a resumed run is then that of an undisturbed one. Slower. An
    operator that has no such algorithm ends the run with its name."""
    ema: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Decay per step of an exponential average of the weights; 0: none. 0.99 averages over about the last 100 steps. Evaluated
    (`heldout/loss_ema`) and saved with the optimizer's states; every command knows it as RUN:ema."""
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
    offload_activations: bool = False
    """Keep the inputs of layers, from which backward recomputes, in host memory; with recompute=layer. Costs two copies over the
    bus for each micro-batch; not run on a GPU."""
    reduction: Literal["fast", "canonical"] = "fast"
    """`canonical` adds the gradients of micro-batches in one fixed order, so that 1, 2 and 4 ranks give the same bits: for checking
    a change of the data-parallel ranks. It needs zero_stage=0, or 1 in fp32, and numbers of ranks and micro-batches that are
    powers of two."""
    profile: ProfileConfig = ProfileConfig()
    """Traces of chosen steps, into the run's directory."""
    num_threads: int = Field(default=1, gt=0)
    """CPU threads per process for torch operators, when there is no GPU."""

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.offload_activations and self.recompute != "layer":
            raise ConfigError(
                "training.offload_activations=true moves what recompute=layer keeps, and training.recompute is "
                f"{self.recompute}; set it to layer"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step."""
        return self.seq_length * self.global_batch_size

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.tokens_per_step


class MixturePhase(Section):
    """Shares of the training sets from a token count on."""

    from_tokens: int = Field(default=0, ge=0)
    """Training tokens after which these weights hold; rounded up to a whole sequence."""
    weights: dict[str, float] = Field(min_length=1)
    """Relative share of samples by name of the set; `train` is data.train. A set that is not named has none."""

    @model_validator(mode="after")
    def _check(self) -> MixturePhase:
        values = list(self.weights.values())
        if not all(0 <= value < math.inf for value in values) or sum(values) <= 0:
            raise ConfigError(f"weights must be at least 0, finite, and not all 0; they are {self.weights}")
        return self


def data_location(value: Any) -> Path | str:
    """A path, unless it names a store: a path would lose one slash of ``s3://``."""
    if isinstance(value, str):
        return value if "://" in value else Path(value)
    if isinstance(value, Path):
        return value
    raise PydanticKnownError("string_type")


DataLocation = Annotated[Path | str, PlainValidator(data_location)]
"""A local path, or the URL of a directory or object in a store: ``s3://bucket/corpus/train``."""


class DataConfig(Section):
    """Where token shards are, and how they are read."""

    train: DataLocation
    """Manifest of the training shards, or the directory that holds it; a URL such as s3://bucket/corpus/train too."""
    heldout: DataLocation | None = None
    """Manifest of the held-out shards; a URL too."""
    tokenizer: DataLocation
    """Tokenizer the shards were made with; its digest is checked against the manifests. A URL too."""
    seed: int = Field(default=0, ge=0)
    """Seed of the data order."""
    cache_dir: Path | None = None
    """Directory for local copies of shards that come from a URL, best on a disk of the node; null: the user's own cache,
    $XDG_CACHE_HOME/hope_megatron/shards or ~/.cache/hope_megatron/shards. Processes and runs share it."""
    cache_gib: float = Field(default=64.0, gt=0, allow_inf_nan=False)
    """GiB that those copies may take; the least recently used make room."""
    mix_with: dict[str, DataLocation] = Field(default={})
    """Further training sets by name (manifest or directory), made with the same tokenizer, mixed with `train` by weight."""
    mix_schedule: tuple[MixturePhase, ...] = ()
    """Weights of the sets; several phases change them at given token counts. Needed with mix_with."""
    prefetch_steps: int = Field(default=2, ge=0, le=256)
    """Batches of so many steps are read ahead by a thread of each process; 0 reads when the step asks."""
    reset_at_documents: bool = False
    """Read each document of a sequence as if it stood alone: memories begin at their learned initial state, and neither
    convolution nor attention sees the document before."""
    on_corrupt: Literal["stop", "skip"] = "stop"
    """When the content of a training shard is not that of its digest: stop, or go on without loss on its tokens and record it."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if bool(self.mix_with) != bool(self.mix_schedule):
            raise ConfigError(
                "data.mix_with and data.mix_schedule belong together: name the further sets and their weights"
            )
        if "train" in self.mix_with:
            raise ConfigError("data.mix_with.train: the name train is data.train itself; give this set another name")
        known = {"train", *self.mix_with}
        unknown = sorted({name for phase in self.mix_schedule for name in phase.weights} - known)
        if unknown:
            raise ConfigError(
                f"data.mix_schedule gives a weight to {unknown[0]!r}, which is no set of data.mix_with; "
                f"there are {', '.join(sorted(known))}"
            )
        unused = sorted(
            known - {name for phase in self.mix_schedule for name, value in phase.weights.items() if value > 0}
        )
        if self.mix_schedule and unused:
            raise ConfigError(f"data.mix_schedule never gives {unused[0]!r} a positive weight; leave the set out")
        starts = [phase.from_tokens for phase in self.mix_schedule]
        if starts and (starts[0] != 0 or starts != sorted(set(starts))):
            raise ConfigError(f"data.mix_schedule must begin at from_tokens=0 and rise; it has {starts}")
        return self


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every: int = Field(default=500, gt=0)
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = Field(default=2, gt=0)
    """How many of the newest checkpoints stay."""
    keep_every: int | None = Field(default=None, gt=0)
    """Checkpoints at multiples of this many steps stay forever."""
    keep_best: int = Field(default=0, ge=0)
    """How many checkpoints with the lowest held-out loss stay, whatever their age; they are evaluated when they are saved."""


class TrackingConfig(Section):
    """Trackers, beside the local metrics.jsonl, which is the truth."""

    sinks: tuple[str, ...] | None = None
    """Trackers to feed, several at once: mlflow, wandb, tensorboard, jsonl (`hope list trackers`); null: mlflow."""
    mlflow: bool = True
    """false: no MLflow, where `sinks` is null."""
    uri: str | None = None
    """Tracking URI of MLflow; null is MLFLOW_TRACKING_URI, or else a SQLite file, mlflow.db, beside the run directories. A user
    name or password in it is masked wherever the configuration is written or printed."""
    experiment: str | None = None
    """Experiment in MLflow, project in Weights & Biases; null: MLFLOW_EXPERIMENT_NAME and WANDB_PROJECT, or else `hope`."""
    tags: dict[str, str] = Field(default={})
    """Tags of the run, for finding it again: `tags: {team: memory}`."""
    jsonl_file: Path | None = None
    """File of the tracker jsonl, which several runs may share; null: tracking.jsonl in the run directory."""

    @property
    def names(self) -> tuple[str, ...]:
        """The trackers that are fed."""
        if self.sinks is not None:
            return self.sinks
        return ("mlflow",) if self.mlflow else ()

    @model_validator(mode="after")
    def _check(self) -> TrackingConfig:
        for name in self.names:
            try:
                TRACKERS[name]
            except UnknownNameError as error:
                raise ConfigError(f"tracking.sinks: {error}") from None
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"tracking.sinks names a tracker twice: {', '.join(self.names)}")
        if not self.mlflow and "mlflow" in self.names:
            raise ConfigError("tracking.sinks has mlflow but tracking.mlflow=false; remove one of them")
        if self.uri is not None and "mlflow" not in self.names:
            reason = "tracking.mlflow=false" if self.sinks is None else "tracking.sinks has no mlflow"
            raise ConfigError(f"tracking.uri is set but {reason}; remove one of them")
        if self.jsonl_file is not None and "jsonl" not in self.names:
            raise ConfigError("tracking.jsonl_file is set but tracking.sinks has no jsonl; remove one of them")
        return self

    @field_serializer("uri")
    def _mask(self, uri: str | None) -> str | None:
        """Every dump of a configuration goes through here: files, checkpoints, MLflow and the screen see no password."""
        return None if uri is None else mask_credentials(uri)
