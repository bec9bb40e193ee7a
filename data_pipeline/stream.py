"""The stream of training samples: a pure function of (manifest, seed, sample number).

Documents lie packed back to back, an end mark after each; a sample is a window of ``seq_length + 1`` tokens, of which
the last is only a target and is also the first of the next window. Epoch after epoch:

1. The shards are put in a new order.
2. Shards are taken in groups of ``shuffle_shards``; the windows that begin in a group are shuffled among themselves.

So a window costs one permutation step and a few slices wherever it lies, only the shards of one group are open at a
time, and remote shards are fetched once per epoch. Nothing depends on ranks, workers or history: the position of a run
is the number of its next sample.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.cache import ShardCache, shard_size
from data_pipeline.errors import CorruptShardError, ManifestError, SamplingError, ShardError, TokenRangeError
from data_pipeline.manifest import Manifest
from data_pipeline.order import Permutation
from data_pipeline.samples import NO_TOKEN, DocumentSpan, SampleStream
from data_pipeline.shards import ShardReader

if TYPE_CHECKING:
    from data_pipeline.ledger import Ledger

log = logging.getLogger(__name__)

ORDER_VERSION = 1  # part of the fingerprint: raise it with every change of the order


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch: shards, and groups of windows within which positions are permuted."""

    shards: list[int]  # numbers of the shards, in the order of this epoch
    starts: list[int]  # where each begins in the epoch's run of tokens
    group_starts: list[int]  # number of the first window of each group that has any
    permutations: list[Permutation | None]  # of the windows of each group

    def window(self, position: int) -> tuple[int, int]:
        """The group and the window at a position of the epoch."""
        group = bisect.bisect_right(self.group_starts, position) - 1
        first, permutation = self.group_starts[group], self.permutations[group]
        return group, position if permutation is None else first + permutation(position - first)


class TokenStream(SampleStream):
    """Samples from the shards of one manifest.

    Args:
        manifest: a `Manifest`, or the path or URL of one (or of its directory).
        seq_length: tokens that the model sees per sample; samples have one more, the last target.
        seed: of the order.
        shuffle: False gives the windows in the order of the shards, every epoch alike.
        shuffle_shards: shards whose windows are mixed; also about the number of shards open at a time.
        verify: check SHA-256 of a shard when it is first opened.
        cache: local copies of the shards; needed when the manifest is given by a URL.
        skip_corrupt: go on when the content of a shard is not what the manifest says, and record it in this ledger. Its
            tokens are NO_TOKEN then; all numbers of samples stay as they are. None: stop. A shard that cannot be read at
            all (a lost disk, a missing file) always stops.

    Raises:
        ManifestError: the manifest cannot be used.
        SamplingError: the data are shorter than one sample.
        ShardError: (on reading) a shard differs from the manifest.
        TokenRangeError: (on reading) a token id is not in the vocabulary.
    """

    def __init__(
        self,
        manifest: Manifest | str | Path,
        seq_length: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
        shuffle_shards: int = 16,
        verify: bool = True,
        cache: ShardCache | None = None,
        skip_corrupt: Ledger | None = None,
    ) -> None:
        if not isinstance(manifest, Manifest):
            manifest = Manifest.load(manifest)
        if seq_length < 1 or shuffle_shards < 1:
            raise SamplingError(f"seq_length={seq_length} and shuffle_shards={shuffle_shards} must be at least 1.")
        self.manifest = manifest
        self.seq_length = seq_length
        self.seed = seed
        self._shuffle = shuffle
        self._shuffle_shards = shuffle_shards
        self.end_id = manifest.eos_id
        self._sizes = [shard.tokens + shard.documents for shard in manifest.shards]
        self.total_tokens = sum(self._sizes)
        self.num_samples = (self.total_tokens - 1) // seq_length
        if self.num_samples < 1:
            raise SamplingError(
                f"{manifest.location or 'the manifest'} holds {self.total_tokens} tokens, end marks included; a sample "
                f"of seq_length={seq_length} needs {seq_length + 1}. Give more text or shorten the sequence."
            )
        if "://" in manifest.location:
            _check_cache(manifest, cache, shuffle_shards if shuffle else 1)
        self._shards = _OpenShards(manifest, verify, cache, capacity=2 * shuffle_shards + 2)
        self._skip_corrupt = skip_corrupt
        self._corrupt: set[int] = set()  # numbers of shards that are left out
        self._epochs: OrderedDict[int, EpochOrder] = OrderedDict()
        self._prefetched: tuple[list[int], int] | None = None
        self._lock = threading.Lock()
        super().__init__()

    @property
    def tokenizer_sha256(self) -> str:
        return self.manifest.tokenizer_sha256

    @property
    def description(self) -> dict[str, Any]:
        return {
            "kind": "tokens",
            "order_version": ORDER_VERSION,
            "manifest": self.manifest.digest,
            "tokenizer": self.manifest.tokenizer_sha256,
            "vocab_size": self.manifest.vocab_size,
            "tokens": self.total_tokens,
            "shards": {shard.name: shard.sha256[:16] for shard in self.manifest.shards},
            "seq_length": self.seq_length,
            "seed": self.seed,
            "shuffle_shards": self._shuffle_shards if self._shuffle else 0,
        }

    @property
    def recipe(self) -> dict[str, Any]:
        return {
            "kind": "tokens",
            "fingerprint": self.fingerprint,
            "manifest": self.manifest.source,
            "seq_length": self.seq_length,
            "seed": self.seed,
            "shuffle": self._shuffle,
            "shuffle_shards": self._shuffle_shards,
        }

    # ---- samples

    def fill(self, number: int, out: np.ndarray, first: int = 0) -> None:
        order, window = self._locate(number)
        self._read(order, window * self.seq_length + first, out)

    def documents(self, number: int) -> list[DocumentSpan]:
        order, window = self._locate(number)
        return self._spans(order, window * self.seq_length, self.seq_length + 1)

    def provenance(self, span: DocumentSpan) -> dict[str, Any]:
        number = self._number(span.shard)
        if span.document < 0:
            return {"source": "left out: the content of the shard is not what the manifest says", "position": -1}
        return self._shards.get(number).provenance(span.document)

    def _locate(self, number: int) -> tuple[EpochOrder, int]:
        if number < 0:
            raise SamplingError(f"sample {number} does not exist: the first is 0.")
        epoch, position = divmod(number, self.num_samples)
        order = self._epoch(epoch)
        group, window = order.window(position)
        if self._shards.is_remote:
            self._prefetch(order, group)
        return order, window

    def _prefetch(self, order: EpochOrder, group: int) -> None:
        """Have the shards of this group and the next on their way."""
        if self._prefetched == (order.shards, group):
            return
        self._prefetched = (order.shards, group)
        first = bisect.bisect_right(order.starts, order.group_starts[group] * self.seq_length) - 1
        self._shards.prefetch(order.shards[first : first + 2 * self._shuffle_shards])

    def _number(self, name: str) -> int:
        for number, shard in enumerate(self.manifest.shards):
            if shard.name == name:
                return number
        raise ManifestError(f"{self.manifest.location} has no shard {name}.")

    # ---- order

    def _epoch(self, epoch: int) -> EpochOrder:
        if not self._shuffle:
            return self._in_order
        order = self._epochs.get(epoch)
        if order is None:
            order = self._make_epoch(epoch)
            with self._lock:
                self._epochs[epoch] = order
                while len(self._epochs) > 4:
                    self._epochs.popitem(last=False)
        return order

    @cached_property
    def _in_order(self) -> EpochOrder:
        starts = list(itertools.accumulate(self._sizes, initial=0))
        return EpochOrder(list(range(len(self._sizes))), starts, [0], [None])

    def _make_epoch(self, epoch: int) -> EpochOrder:
        count = len(self._sizes)
        key = (self.manifest.digest, self.seed, epoch)
        shards = list(map(Permutation(count, "shards", *key), range(count)))
        starts = list(itertools.accumulate((self._sizes[shard] for shard in shards), initial=0))
        # A window belongs to the group in which its first token lies; the last windows may reach into the next group.
        bounds = [-(-starts[first] // self.seq_length) for first in range(0, count, self._shuffle_shards)]
        bounds = sorted({min(bound, self.num_samples) for bound in (*bounds, self.num_samples)})
        pairs = list(itertools.pairwise(bounds))
        permutations = [Permutation(stop - first, "windows", *key, first) for first, stop in pairs]
        return EpochOrder(shards, starts, [first for first, _ in pairs], list(permutations))

    # ---- tokens

    def _read(self, order: EpochOrder, start: int, out: np.ndarray) -> None:
        """Copy the tokens from ``start`` of an epoch's run into ``out``."""
        slot = bisect.bisect_right(order.starts, start) - 1
        at, wanted = 0, len(out)
        while at < wanted:
            local = start + at - order.starts[slot]
            reader = self._reader(order.shards[slot])
            if reader is None:
                count = min(wanted - at, self._sizes[order.shards[slot]] - local)
                out[at : at + count] = NO_TOKEN
                at += count
            else:
                at += _copy(reader, local, out[at:], self.end_id)
            slot += 1
        if out.max() >= self.manifest.vocab_size:
            names = {span.shard for span in self._spans(order, start, wanted)}
            raise TokenRangeError(
                f"token id {out.max()} in {' or '.join(sorted(names))} is outside the vocabulary of "
                f"{self.manifest.vocab_size}: the shards were made with another tokenizer. Prepare the data again."
            )

    def _reader(self, number: int) -> ShardReader | None:
        """The shard of a number, or None if it is corrupt and left out."""
        if number in self._corrupt:
            return None
        try:
            return self._shards.get(number)
        except CorruptShardError as error:
            if self._skip_corrupt is None:
                raise
            shard = self.manifest.shards[number]
            self._skip_corrupt.record_corrupt(shard.name, self.manifest.location, shard.sha256, reason=str(error))
            self._corrupt.add(number)
            log.error("left out, its %d tokens carry no loss: %s", shard.tokens, error)
            return None

    def _spans(self, order: EpochOrder, start: int, length: int) -> list[DocumentSpan]:
        spans: list[DocumentSpan] = []
        slot = bisect.bisect_right(order.starts, start) - 1
        at = 0
        while at < length:
            number = order.shards[slot]
            reader = self._reader(number)
            local = start + at - order.starts[slot]
            if reader is None:
                stop = min(length, at + self._sizes[number] - local)
                spans.append(DocumentSpan(at, stop, self.manifest.shards[number].name, -1, local))
                at = stop
                slot += 1
                continue
            document = int(reader.ends.searchsorted(local, side="right"))
            while at < length and document < len(reader.ends):
                begin = int(reader.ends[document] - reader.lengths[document] - 1)
                stop = min(length, at + int(reader.ends[document]) - local)
                spans.append(DocumentSpan(at, stop, self.manifest.shards[number].name, document, local - begin))
                local += stop - at
                at = stop
                document += 1
            slot += 1
        return spans

    # ---- evaluation

    @property
    def num_windows(self) -> int:
        """Windows that `windows` yields: the samples of one epoch, and a shorter last one if tokens are left."""
        return -(-(self.total_tokens - 1) // self.seq_length)

    def window(self, number: int) -> np.ndarray:
        """Window ``number`` in the order of the shards: int64 [seq_length + 1], the last one possibly shorter."""
        if not 0 <= number < self.num_windows:
            raise SamplingError(f"window {number} does not exist: there are {self.num_windows}.")
        start = number * self.seq_length
        out = np.empty(min(self.seq_length + 1, self.total_tokens - start), dtype=np.int64)
        self._read(self._in_order, start, out)
        return out

    def windows(self) -> Iterator[np.ndarray]:
        """All windows in order: every token but the first is a target exactly once."""
        return map(self.window, range(self.num_windows))


def _copy(reader: ShardReader, local: int, out: np.ndarray, eos_id: int) -> int:
    """Copy from position ``local`` of a shard's packed tokens until ``out`` or the shard ends; returns the count."""
    ends, starts, lengths, tokens = reader.ends, reader.starts, reader.lengths, reader.tokens
    document = int(ends.searchsorted(local, side="right"))
    at, wanted = 0, len(out)
    while at < wanted and document < len(ends):
        left = int(ends[document]) - local - at - 1  # tokens of this document, then its end mark
        count = min(left, wanted - at)
        first = int(starts[document]) + int(lengths[document]) - left
        out[at : at + count] = tokens[first : first + count]
        at += count
        if at < wanted:
            out[at] = eos_id
            at += 1
        document += 1
    return at


def _check_cache(manifest: Manifest, cache: ShardCache | None, shuffle_shards: int) -> None:
    if cache is None:
        raise ManifestError(
            f"{manifest.location} is remote: it is read through a cache=ShardCache(directory, max_bytes), or copy it here."
        )
    needed = sum(sorted(map(shard_size, manifest.shards))[-shuffle_shards - 1 :])
    if needed > cache.max_bytes:
        raise SamplingError(
            f"{manifest.location}: mixing {shuffle_shards} shards at a time needs {needed} bytes, the cache has "
            f"{cache.max_bytes}: every sample would fetch a shard. Enlarge the cache (max_bytes; data.cache_gib of a run) "
            f"or lower shuffle_shards."
        )


class _OpenShards:
    """The readers in use, those opened first closed first. A shard's digest is checked at its first opening."""

    def __init__(self, manifest: Manifest, verify: bool, cache: ShardCache | None, capacity: int) -> None:
        self._manifest = manifest
        self._cache = cache
        self._capacity = capacity
        self._unverified = set(range(len(manifest.shards))) if verify else set()
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._lock = threading.Lock()
        self.is_remote = "://" in manifest.location

    def get(self, number: int) -> ShardReader:
        reader = self._readers.get(number)
        if reader is not None:
            return reader
        with self._lock:
            if number not in self._readers:
                self._readers[number] = self._open(number)
                self._unverified.discard(number)
                while len(self._readers) > self._capacity:
                    self._readers.popitem(last=False)
            return self._readers[number]

    def _open(self, number: int) -> ShardReader:
        info = self._manifest.shards[number]
        dtype, verify = self._manifest.token_dtype, number in self._unverified
        if not self.is_remote:
            return ShardReader(self._manifest.path(info.name), info, dtype, verify=verify)
        assert self._cache is not None
        path = self._cache.fetch(self._manifest, info)
        try:
            return ShardReader(path, info, dtype, verify=verify)
        except ShardError as error:
            log.warning("the local copy is bad, fetching it again: %s", error)
            self._cache.drop(info)
        return ShardReader(self._cache.fetch(self._manifest, info), info, dtype, verify=True)

    def prefetch(self, numbers: list[int]) -> None:
        assert self._cache is not None
        self._cache.prefetch(self._manifest, [self._manifest.shards[number] for number in numbers])
