"""How often a run passes over its data, and what repeated tokens are worth. Imports no torch.

The law is that of Muennighoff et al., "Scaling Data-Constrained Language Models" (arXiv 2305.16264): D tokens of which U are
unique are worth U + U R* (1 - exp(-R / R*)) unique ones, with R = D / U - 1 repetitions and R* = 15.39. Up to 4 epochs they found
no difference that matters; beyond about 16 R*, nothing is gained at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hope_megatron.config import RunConfig

MAX_EPOCHS = 4.0
"""Epochs up to which repeated tokens are about as good as new ones."""
_DECAY_OF_REPETITIONS = 15.387756


@dataclass(frozen=True)
class Passes:
    """How often one data set is read."""

    name: str
    """`train`, or a name of data.mix_with."""
    unique_tokens: int
    tokens: int
    """Read in all."""

    @property
    def epochs(self) -> float:
        """Times that every token is read, on average."""
        return self.tokens / self.unique_tokens

    @property
    def worth_tokens(self) -> float:
        """Unique tokens that would teach as much."""
        if self.epochs <= 1:
            return float(self.tokens)
        repetitions = self.epochs - 1
        gain = _DECAY_OF_REPETITIONS * (1 - math.exp(-repetitions / _DECAY_OF_REPETITIONS))
        return self.unique_tokens * (1 + gain)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        shown = {"name": self.name, "unique_tokens": self.unique_tokens, "tokens": self.tokens}
        return {**shown, "epochs": self.epochs, "worth_tokens": self.worth_tokens}


def passes_over(source: Any, samples: int) -> list[Passes]:
    """How often the data sets of a source are read in its first samples.

    Args:
        source: a `SampleSource`; a mixture (`counts`, `datasets`) is told apart, and one that took over from other data
            (`start`, `stream`) counts from there.
        samples: sample number at which the run ends.
    """
    if hasattr(source, "start") and hasattr(source, "stream"):
        return passes_over(source.stream, max(0, samples - source.start))
    sets = {"train": (source, samples)}
    if hasattr(source, "counts") and hasattr(source, "datasets"):
        sets = {name: (source.datasets[name], count) for name, count in source.counts(samples).items()}
    return [
        Passes(name, stream.num_samples * stream.seq_length, count * stream.seq_length)
        for name, (stream, count) in sets.items()
    ]


def planned_passes(source: Any, config: RunConfig, samples_done: int = 0, step: int = 0) -> list[Passes]:
    """How often the data sets will have been read when the run ends.

    Args:
        source: where training samples come from.
        config: the run.
        samples_done, step: where it stands: batches may have had another size until then.
    """
    return passes_over(source, samples_done + (config.training.steps - step) * config.training.global_batch_size)


def passes_text(passes: Sequence[Passes]) -> str:
    """`3.2 epochs of train (1,200,000 tokens)`."""
    return ", ".join(f"{_number(one.epochs)} epochs of {one.name} ({one.unique_tokens:,} tokens)" for one in passes)


def repetition_warning(passes: Sequence[Passes]) -> str | None:
    """Why so many epochs are little use, and what to do; None up to 4."""
    worst = max(passes, key=lambda one: one.epochs)
    if worst.epochs <= MAX_EPOCHS:
        return None
    return (
        f"{_number(worst.epochs)} epochs of {worst.name}: up to {MAX_EPOCHS:.0f}, repeated text teaches about as much as new "
        f"text, then less and less. These {worst.tokens:,} tokens are worth about {worst.worth_tokens:,.0f} new ones "
        "(Muennighoff et al. 2023, arXiv 2305.16264). Give more text, or train for fewer steps: "
        f"{MAX_EPOCHS:.0f} epochs are {MAX_EPOCHS * worst.unique_tokens:,.0f} tokens of it"
    )


def _number(epochs: float) -> str:
    return f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.2g}" if epochs < 0.1 else f"{epochs:.1f}"
