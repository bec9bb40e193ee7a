"""The smallest run that has every part: two layers of memories, a slow CMS level, M3, and samples from a formula."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hope_megatron.config import (
    CheckpointConfig,
    CMSConfig,
    CMSLevelConfig,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    MupConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrackingConfig,
    TrainingConfig,
)

VOCAB_SIZE = 64
SEQ_LENGTH = 16


def tiny_run_config(
    *,
    tp: int = 1,
    cp: int = 1,
    sequence_parallel: bool = False,
    zero_stage: int = 1,
    precision: str = "fp32",
    output_dir: Path | str = "runs",
    hidden_size: int = 32,
    num_heads: int = 2,
    mup_base_width: int | None = None,
    cms: CMSConfig | None = None,
    training: Mapping[str, Any] | None = None,
    optim: Mapping[str, Any] | None = None,
    checkpoint: Mapping[str, Any] | None = None,
) -> RunConfig:
    """A run of a model with 20 thousand parameters; keywords change what tests vary."""
    return RunConfig(
        name="tiny",
        output_dir=Path(output_dir),
        model=ModelConfig(
            vocab_size=VOCAB_SIZE,
            vocab_multiple=16,
            num_layers=2,
            hidden_size=hidden_size,
            num_heads=num_heads,
            memory=MemoryConfig(chunk_tokens=8),  # type: ignore[call-arg]
            mup=MupConfig(base_width=mup_base_width) if mup_base_width else None,
            cms=cms
            or CMSConfig(
                levels=(CMSLevelConfig(hidden_size=32), CMSLevelConfig(hidden_size=16, update_period_steps=2))
            ),
        ),
        parallel=ParallelConfig(
            tensor_parallel=tp, context_parallel=cp, sequence_parallel=sequence_parallel, zero_stage=zero_stage
        ),
        optim=OptimConfig(**{"lr": 1e-2, "slow_period_steps": 3, "warmup_steps": 2, "grad_clip": 1.0, **(optim or {})}),
        training=TrainingConfig(
            **{
                "steps": 6,
                "seq_length": SEQ_LENGTH,
                "global_batch_size": 4,
                "precision": precision,
                "log_every": 1,
                "eval_sequences": 3,
                **(training or {}),
            }
        ),
        data=DataConfig(train=Path("train"), tokenizer=Path("tokenizer.model")),
        checkpoint=CheckpointConfig(**(checkpoint or {})),
        tracking=TrackingConfig(mlflow=False),
    )


class RepeatingSource:
    """Samples that are a function of their number: random tokens whose second half repeats the first.

    Satisfies the Protocol `SampleSource` of `hope_megatron.training.batches`.
    """

    def __init__(self, seed: int = 0, seq_length: int = SEQ_LENGTH, num_samples: int = 1000) -> None:
        self.seed, self.seq_length, self.num_samples = seed, seq_length, num_samples
        self.end_id = 0

    def sample(self, number: int, first: int = 0, stop: int | None = None) -> np.ndarray:
        """int64 [seq_length + 1], or part of it."""
        half = self.seq_length // 2
        rng = np.random.default_rng((self.seed, number % self.num_samples))
        said = rng.integers(0, VOCAB_SIZE, half, dtype=np.int64)
        return np.concatenate([said, said, said[:1]])[first:stop]

    def state(self, number: int) -> dict[str, Any]:
        """The position before a sample."""
        return {"sample": number, "seed": self.seed}

    def check_state(self, state: Mapping[str, Any]) -> int:
        """The sample number of a position, if it is of this source."""
        if state["seed"] != self.seed:
            raise ValueError(f"samples of seed {state['seed']}, not {self.seed}")
        return int(state["sample"])
