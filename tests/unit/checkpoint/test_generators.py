"""Random numbers continue as if nothing had happened."""

from __future__ import annotations

import random

import numpy as np
import torch

from hope_megatron.checkpoint.generators import generator_states, restore_generators, seed_generators


def draw():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))


def test_all_generators_continue():
    draw()  # leaves half a pair of normal numbers in Python's and NumPy's generators
    states = generator_states()
    expected = [draw() for _ in range(3)]
    draw()
    restore_generators(states)
    assert [draw() for _ in range(3)] == expected


def test_seed_decides_every_generator():
    drawn = {}
    for key in ((1, 0), (1, 1), (2, 0), (1, 0)):
        seed_generators(*key)
        numbers = draw()
        assert drawn.setdefault(key, numbers) == numbers
    for position in range(5):
        assert len({numbers[position] for numbers in drawn.values()}) == 3
