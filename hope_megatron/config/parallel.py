"""How the work is spread: tensor and sequence parallelism by Megatron-Core, data parallelism and ZeRO by DeepSpeed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hope_megatron.config.base import ConfigError, Section


class ParallelConfig(Section):
    """Axes of the process mesh. Data parallelism is what is left: world size / (tensor_parallel x context_parallel)."""

    tensor_parallel: int = Field(default=1, gt=0)
    """Ranks that share each layer (heads, hidden widths, vocabulary)."""
    context_parallel: int = Field(default=1, gt=0)
    """Ranks that share each sequence. Mixers exchange tokens for heads, so heads are divided by tensor_parallel x this."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards over data parallelism: optimizer (1), gradients too (2), parameters too (3)."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over data-parallel ranks in bf16 runs. bf16 halves what travels, and rounds at every
    addition."""
    overlap_comm: bool | None = None
    """Sum gradients over data-parallel ranks while the last backward pass of a step still runs (at ZeRO-2 and 3 of each). None: on
    GPUs. Same sums on two ranks; on more, bits may differ as additions come in another order."""
    cpu_offload: bool = False
    """Keep optimizer state in host memory."""

    @property
    def ranks_per_sequence(self) -> int:
        """Ranks that work on the same tokens or on parts of the same sequences."""
        return self.tensor_parallel * self.context_parallel

    @property
    def group_in_words(self) -> str:
        """What a world must be divisible by, for an error."""
        cp = f" x context_parallel={self.context_parallel}" if self.context_parallel > 1 else ""
        return f"parallel.tensor_parallel={self.tensor_parallel}{cp}"

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ConfigError(
                "parallel.sequence_parallel=true needs tensor_parallel of at least 2; "
                "set sequence_parallel=false or tensor_parallel=2"
            )
        return self


Spans = tuple[tuple[int, int], ...]
"""Tokens of a sequence: first and stop of each stretch, in order."""


def own_spans(seq_length: int, piece: int, cp_rank: int, cp_size: int) -> Spans:
    """The tokens of a sequence that a context-parallel rank reads: its slice of every piece that the model reads at once.

    The last piece may be shorter. All pieces divide by the size, which configurations are checked for.
    """
    if cp_size == 1:
        return ((0, seq_length),)
    spans = []
    for first in range(0, seq_length, piece):
        width = min(piece, seq_length - first) // cp_size
        spans.append((first + cp_rank * width, first + (cp_rank + 1) * width))
    return tuple(spans)
