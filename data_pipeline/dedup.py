"""Duplicates, exact and near.

Exact duplicates share the SHA-256 of their text. Near-duplicates share a large part of their word 5-grams: MinHash
estimates the Jaccard similarity of two sets from fixed-size signatures, and banding finds the candidates without
comparing all pairs (Broder, 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3).
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from data_pipeline.files import close_all, writing

NUM_HASHES = 128
NUM_BANDS = 16  # of 8 hashes: a pair of similarity 0.8 becomes a candidate with probability 0.95, one of 0.5 with 0.06
SHINGLE_WORDS = 5
DIGEST_BYTES = 16

_WORD = re.compile(r"\w+")
# Multiply-shift hashing of 64-bit values: odd multipliers, the upper 32 bits of the product count.
_MULTIPLIERS = np.frombuffer(
    hashlib.shake_128(b"hope data minhash multipliers").digest(8 * NUM_HASHES), dtype="<u8"
) | np.uint64(1)
_ADDENDS = np.frombuffer(hashlib.shake_128(b"hope data minhash addends").digest(8 * NUM_HASHES), dtype="<u8")


def minhash(text: str) -> np.ndarray:
    """MinHash signature of a text's word 5-grams, case folded: uint32 [128]."""
    words = _WORD.findall(text.casefold())
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    # a text without a word is its own shingle
    shingles = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(count)} if words else {text}
    digests = b"".join([hashlib.blake2b(s.encode("utf-8"), digest_size=8).digest() for s in shingles])
    values = np.sort(np.frombuffer(digests, dtype="<u8"))
    signature = np.full(NUM_HASHES, np.iinfo(np.uint32).max, dtype=np.uint32)
    for start in range(0, len(values), 4096):
        hashed = (values[start : start + 4096, None] * _MULTIPLIERS + _ADDENDS) >> np.uint64(32)
        np.minimum(signature, hashed.min(axis=0).astype(np.uint32), out=signature)
    return signature


@dataclass
class NearDuplicates:
    """The signatures seen so far: about 700 bytes per kept document."""

    threshold: float  # estimated Jaccard similarity from which two documents count as the same, in (0, 1]
    _signatures: list[np.ndarray] = field(default_factory=list)
    _bands: dict[bytes, list[int]] = field(default_factory=dict)

    def is_duplicate(self, signature: np.ndarray) -> bool:
        """Whether a document seen before is at least ``threshold`` similar."""
        candidates = {number for key in _band_keys(signature) for number in self._bands.get(key, ())}
        return any((self._signatures[number] == signature).mean() >= self.threshold for number in sorted(candidates))

    def add(self, signature: np.ndarray) -> None:
        """Remember a document that is kept."""
        for key in _band_keys(signature):
            self._bands.setdefault(key, []).append(len(self._signatures))
        self._signatures.append(signature)


def _band_keys(signature: np.ndarray) -> list[bytes]:
    bands = signature.reshape(NUM_BANDS, -1)
    return [
        hashlib.blake2b(struct.pack("<H", band) + values.tobytes(), digest_size=8).digest()
        for band, values in enumerate(bands)
    ]


SEEN_NAMES = (".seen-digests", ".seen-signatures")


class SeenDocuments:
    """The documents kept so far, for the search of duplicates: in memory, and in files from which a later start reads.

    Memory: about 100 bytes per kept document, and 700 more when near-duplicates are looked for.
    """

    def __init__(
        self, directory: Path, *, exact: bool, near_threshold: float | None, sizes: Sequence[int] = (0, 0)
    ) -> None:
        """``sizes`` are the lengths of the two files at the last `commit`; what lies beyond is cut off."""
        self._digests: set[bytes] | None = set() if exact else None
        self._near = NearDuplicates(near_threshold) if near_threshold is not None else None
        self._files: list[IO[bytes]] = []
        self._directory = directory
        for name, size in zip(SEEN_NAMES, sizes, strict=True):
            with writing(directory):
                file = open(directory / name, "r+b" if size else "w+b")  # noqa: SIM115 - closed by close()
                self._files.append(file)
                file.truncate(size)
        if self._digests is not None:
            while digest := self._files[0].read(DIGEST_BYTES):
                self._digests.add(digest)
        if self._near is not None:
            while signature := self._files[1].read(4 * NUM_HASHES):
                self._near.add(np.frombuffer(signature, dtype="<u4"))

    def admit(self, sha256: bytes, signature: np.ndarray | None) -> str | None:
        """Why a document is a duplicate; or None, and then it counts as seen from now on."""
        digest = sha256[:DIGEST_BYTES]
        if self._digests is not None and digest in self._digests:
            return "duplicate"
        if self._near is not None:
            assert signature is not None
            if self._near.is_duplicate(signature):
                return "near_duplicate"
            self._near.add(signature)
            self._write(1, signature.astype("<u4").tobytes())
        if self._digests is not None:
            self._digests.add(digest)
            self._write(0, digest)
        return None

    def _write(self, file: int, data: bytes) -> None:
        with writing(self._directory):
            self._files[file].write(data)

    def commit(self) -> list[int]:
        """Make the files safe; returns their lengths."""
        with writing(self._directory):
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
        return [file.tell() for file in self._files]

    def close(self) -> None:
        close_all(self._files)
