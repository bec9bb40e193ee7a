"""Keyed permutations: a shuffle that is a function of its key, needs no memory, and can be entered anywhere."""

from __future__ import annotations

import hashlib
import math

_MASK = (1 << 64) - 1
_ROUNDS = 6


class Permutation:
    """A pseudo-random permutation of range(size), computed one element at a time.

    A generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, method 3) on the
    rectangle of sides ceil(sqrt(size)), walked along its cycle while it leads outside the range. The rectangle is
    larger than the range by less than one side, so a walk of more than one step is rare.
    """

    def __init__(self, size: int, *key: int | str) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, not {size}")
        self.size = size
        self._rows = math.isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        seed = hashlib.blake2b(repr((size, *key)).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(seed[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where the permutation sends ``index``."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is outside the permutation of {self.size} elements")
        index = self._encipher(index)
        while index >= self.size:
            index = self._encipher(index)
        return index

    def _encipher(self, index: int) -> int:
        rows, columns = self._rows, self._columns
        right, left = divmod(index, rows)
        for i in range(0, _ROUNDS, 2):
            left = (left + _mix(right ^ self._keys[i])) % rows
            right = (right + _mix(left ^ self._keys[i + 1])) % columns
        return right * rows + left


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): every input bit moves every output bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
