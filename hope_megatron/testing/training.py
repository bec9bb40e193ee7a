"""Build an engine and train it for some steps inside a distributed test."""

from __future__ import annotations

from typing import Any

from hope_megatron.testing.tiny import RepeatingSource


def build(config: Any) -> Any:
    """The engine of a run, on fresh process groups: a worker may build several, one after the other."""
    from megatron.core import parallel_state

    from hope_megatron.engine.new_engine import build_engine
    from hope_megatron.parallel.distributed import init_distributed

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    return build_engine(config, init_distributed(config.parallel))


def advance(engine: Any, config: Any, state: Any, num_steps: int) -> list[tuple[float, float]]:
    """Train; returns losses and norms, which are equal only if everything is."""
    from hope_megatron.training.batches import BatchReader
    from hope_megatron.training.step import train_step

    with BatchReader(RepeatingSource(), config, engine.mesh) as reader:
        results = [train_step(engine, reader, state, config) for _ in range(num_steps)]
    return [(result.loss, result.grad_norm) for result in results]
