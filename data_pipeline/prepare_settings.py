"""What decides the bytes that `data_pipeline.prepare` writes, beside the sources and the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.corpus import ReadOptions
from data_pipeline.errors import OutputError
from data_pipeline.filters import Filters


@dataclass(frozen=True)
class Settings:
    """Everything but the sources and the tokenizer that decides the bytes of the result."""

    held_out_fraction: float
    shard_tokens: int
    read: ReadOptions
    filters: Filters
    deduplicate: bool
    near_duplicates: float | None
    slice_index: int
    slice_count: int

    def check(self) -> None:
        """Raise OutputError for a setting out of its bounds, with the remedy."""
        if not 0 <= self.held_out_fraction < 1:
            raise OutputError(f"held_out_fraction={self.held_out_fraction} must be at least 0 and below 1.")
        if self.shard_tokens < 1:
            raise OutputError(f"shard_tokens={self.shard_tokens} must be at least 1.")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise OutputError(f"near_duplicates={self.near_duplicates} must be above 0 and at most 1; 0.8 is usual.")
        if not 0 <= self.slice_index < self.slice_count:
            raise OutputError(
                f"slice {self.slice_index}/{self.slice_count} does not exist: the first is 0, "
                f"the last {self.slice_count - 1}."
            )
