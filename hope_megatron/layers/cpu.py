"""Megatron-Core on CPU: the three places of megatron-core 0.16 that hard-code CUDA, replaced.

Nothing here changes what is computed. With a GPU none of it is installed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel import random as megatron_random


def install_cpu_support() -> None:
    """Let Megatron-Core allocate, synchronise and draw random numbers on the CPU. Idempotent; a no-op with CUDA."""
    if torch.cuda.is_available() or isinstance(megatron_random._CUDA_RNG_STATE_TRACKER, _CPURNGTracker):
        return
    # tensor_parallel/{layers,mappings}.py allocate buffers on `torch.cuda.current_device()`
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    # parallel_state.py and timers synchronise the device
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    # tensor_parallel/random.py keeps CUDA generator states; recomputation forks and restores them
    megatron_random._CUDA_RNG_STATE_TRACKER = _CPURNGTracker()
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.empty(0, dtype=torch.uint8)
    megatron_random._set_cuda_rng_state = lambda *args, **kwargs: None


class _CPURNGTracker(megatron_random.CudaRNGStatesTracker):
    """Megatron's tracker of named generator states, over the CPU generator."""

    def add(self, name: str, seed: int) -> None:
        self._is_initialized = True
        if seed in self.seeds_ or name in self.states_:
            raise ValueError(f"generator state {name!r} or seed {seed} is already tracked")
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        outer = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)
