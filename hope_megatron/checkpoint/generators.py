"""The random generators of a process as tensors, for checkpoints."""

from __future__ import annotations

import random

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

_TRACKER = "megatron/"


def seed_generators(seed: int, dp_rank: int) -> None:
    """Start all generators of this process where a run with this seed starts them.

    Unseeded, Python and NumPy begin from the operating system's entropy and no run could be repeated. Tensor-parallel
    ranks share a seed, because what they hold in common must see the same random numbers.
    """
    words = np.random.SeedSequence((seed, dp_rank)).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def generator_states() -> dict[str, Tensor]:
    """States of all generators of this process: Python's, NumPy's, torch's on CPU and GPU, Megatron-Core's tracked ones."""
    _, words, gauss = random.getstate()
    mersenne = np.random.get_state(legacy=False)
    keys, position = mersenne["state"]["key"], mersenne["state"]["pos"]
    states = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, mersenne["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([mersenne["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    tracked = get_cuda_rng_tracker().get_states()
    return states | {f"{_TRACKER}{name}": state for name, state in tracked.items()}


def restore_generators(states: dict[str, Tensor]) -> None:
    """Continue with the random numbers that would have come after `generator_states`."""
    gauss = states["python_gauss"]
    random.setstate((3, tuple(states["python"].tolist()), float(gauss[0]) if gauss.numel() else None))
    position, has_gauss = states["numpy_position"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(states["numpy_gauss"][0])))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {name[len(_TRACKER) :]: state for name, state in states.items() if name.startswith(_TRACKER)}
    if tracked:
        get_cuda_rng_tracker().set_states(tracked)


def fresh_generator_states(seed: int, dp_rank: int) -> dict[str, Tensor]:
    """The states that `seed_generators` would begin with; this process's own generators stay as they are."""
    before = generator_states()
    try:
        seed_generators(seed, dp_rank)
        return generator_states()
    finally:
        restore_generators(before)
