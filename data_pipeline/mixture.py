"""Mixtures: several streams drawn from by weight, the weights changing at given token counts.

Samples are dealt in cycles of 4096. Within a cycle each data set has a fixed number of places (its weight, rounded by
largest remainders), and the places are shuffled by the key of the cycle. Which data set a sample comes from, and which
of its samples it is, therefore follow from the sample number; each data set is read in its own order, epoch after
epoch, and none of its samples is left out or repeated when weights change.
"""

from __future__ import annotations

import bisect
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_pipeline.errors import SamplingError
from data_pipeline.samples import DocumentSpan, SampleStream

CYCLE = 4096
ORDER_VERSION = 1

Weights = Mapping[str, float]
Schedule = Sequence[tuple[int, Weights]]


@dataclass(frozen=True)
class _Phase:
    """A stretch of samples with constant weights."""

    start: int  # number of its first sample
    places: np.ndarray  # int64 [num_datasets], places per cycle
    taken: np.ndarray  # int64 [num_datasets], samples of each data set before the phase


class MixtureStream(SampleStream):
    """Samples from several streams of the same sequence length and tokenizer.

    Args:
        datasets: streams by name.
        weights: relative share of samples by name, or a schedule: pairs (token count from which they hold, weights),
            the first at 0. Data sets that are not named have weight 0. Shares are rounded to 1/4096, but a positive
            one never to 0.
        seed: of the order in which data sets alternate.

    ``num_samples`` is the sum over the data sets; data sets of high weight pass several epochs in that time.
    """

    def __init__(self, datasets: Mapping[str, SampleStream], weights: Weights | Schedule, seed: int = 0) -> None:
        if not datasets:
            raise SamplingError("a mixture needs at least one data set.")
        self.datasets = dict(sorted(datasets.items()))
        self._names = list(self.datasets)
        self._streams = list(self.datasets.values())
        self.seed = seed
        for attribute in ("seq_length", "tokenizer_sha256"):
            values = {name: getattr(stream, attribute) for name, stream in self.datasets.items()}
            if len(set(values.values())) > 1:
                raise SamplingError(f"the data sets of a mixture differ in {attribute}: {values}. Prepare them alike.")
        self.seq_length = self._streams[0].seq_length
        self.num_samples = sum(stream.num_samples for stream in self._streams)
        self.end_id = self._streams[0].end_id
        self._cycles: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()
        self._phases: list[_Phase] = []
        for tokens, some in [(0, weights)] if isinstance(weights, Mapping) else weights:
            self._add_phase(tokens, some)
        if not self._phases:
            raise SamplingError("the schedule of a mixture is empty: give weights from token 0 on.")
        self._starts = [phase.start for phase in self._phases]
        super().__init__()

    @property
    def tokenizer_sha256(self) -> str:
        return self._streams[0].tokenizer_sha256

    @property
    def description(self) -> dict[str, Any]:
        return {
            "kind": "mixture",
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "schedule": self._schedule,
            "datasets": {name: stream.description for name, stream in self.datasets.items()},
        }

    @property
    def _schedule(self) -> list[dict[str, Any]]:
        return [
            {"first_sample": phase.start, "places": dict(zip(self._names, phase.places.tolist(), strict=True))}
            for phase in self._phases
        ]

    @property
    def recipe(self) -> dict[str, Any]:
        return {
            "kind": "mixture",
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "schedule": self._schedule,
            "datasets": {name: stream.recipe for name, stream in self.datasets.items()},
        }

    # ---- which sample of which data set

    def locate(self, number: int) -> tuple[str, int]:
        """Name of the data set that sample ``number`` comes from, and its number there."""
        index, local = self._locate(number)
        return self._names[index], local

    def counts(self, number: int) -> dict[str, int]:
        """How many of the first ``number`` samples each data set gives."""
        phase_number = bisect.bisect_right(self._starts, number) - 1
        taken = self._taken(phase_number, number - self._starts[phase_number])
        return dict(zip(self._names, taken.tolist(), strict=True))

    def _locate(self, number: int) -> tuple[int, int]:
        if number < 0:
            raise SamplingError(f"sample {number} does not exist: the first is 0.")
        phase_number = bisect.bisect_right(self._starts, number) - 1
        phase = self._phases[phase_number]
        cycle, place = divmod(number - phase.start, CYCLE)
        order, ranks = self._cycle(phase_number, cycle, phase.places)
        dataset = int(order[place])
        return dataset, int(phase.taken[dataset]) + cycle * int(phase.places[dataset]) + int(ranks[place])

    def _cycle(self, phase_number: int, cycle: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The data set of every place of a cycle, and how many places of the same data set come before it."""
        key = (phase_number, cycle)
        found = self._cycles.get(key)
        if found is None:
            order = np.repeat(np.arange(len(places)), places)[_shuffled(CYCLE, self.seed, *key)]
            ranks = np.empty(CYCLE, dtype=np.int64)
            for dataset, count in enumerate(places):
                ranks[order == dataset] = np.arange(count)
            found = (order, ranks)
            with self._lock:
                self._cycles[key] = found
                while len(self._cycles) > 8:
                    self._cycles.popitem(last=False)
        return found

    def _taken(self, phase_number: int, samples: int) -> np.ndarray:
        """Samples of each data set before sample ``samples`` of a phase: int64 [num_datasets]."""
        phase = self._phases[phase_number]
        cycle, rest = divmod(samples, CYCLE)
        order, _ = self._cycle(phase_number, cycle, phase.places)
        return phase.taken + cycle * phase.places + np.bincount(order[:rest], minlength=len(self._names))

    def _add_phase(self, tokens: int, weights: Weights) -> None:
        start = -(-tokens // self.seq_length)
        taken = np.zeros(len(self._names), dtype=np.int64)
        if self._phases:
            if start <= self._phases[-1].start:
                raise SamplingError(
                    f"the schedule of a mixture must rise by at least a sample; token {tokens} does not."
                )
            taken = self._taken(len(self._phases) - 1, start - self._phases[-1].start)
        elif start:
            raise SamplingError(f"the schedule of a mixture must begin at token 0, not {tokens}.")
        self._phases.append(_Phase(start, self._places(weights), taken))

    def _places(self, weights: Weights) -> np.ndarray:
        unknown = sorted(set(weights) - set(self._names))
        if unknown:
            raise SamplingError(
                f"weights name {unknown[0]!r}, which is no data set. There are: {', '.join(self._names)}."
            )
        values = np.array([float(weights.get(name, 0.0)) for name in self._names])
        if not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
            raise SamplingError(f"weights must be at least 0 with a positive sum, not {dict(weights)}.")
        return round_shares(values / values.sum(), CYCLE)

    # ---- samples

    def fill(self, number: int, out: np.ndarray, first: int = 0) -> None:
        dataset, local = self._locate(number)
        self._streams[dataset].fill(local, out, first)

    def documents(self, number: int) -> list[DocumentSpan]:
        name, local = self.locate(number)
        return [replace(span, dataset=name) for span in self.datasets[name].documents(local)]

    def provenance(self, span: DocumentSpan) -> dict[str, Any]:
        return self.datasets[span.dataset].provenance(span)


def round_shares(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers of the given sum in proportion to shares, at least 1 for a positive one: int64 [len(shares)]."""
    exact = shares * total
    counts = np.where(shares > 0, np.maximum(1, np.floor(exact)), 0).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")  # the most short-changed first
    for i in range(max(0, total - int(counts.sum()))):
        counts[by_remainder[i]] += 1
    while counts.sum() > total:  # raising tiny shares to 1 took too much: the largest gives
        counts[np.argmax(counts)] -= 1
    return counts


def _shuffled(size: int, *key: int) -> np.ndarray:
    """A permutation that depends on nothing but its key, not on a library's random generator: int64 [size]."""
    seed = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.argsort(np.frombuffer(hashlib.shake_128(seed).digest(8 * size), dtype="<u8"), kind="stable")
