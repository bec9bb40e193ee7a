"""What a run has read: its streams, one after the other, and the documents behind any of its samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.cache import ShardCache
from data_pipeline.errors import DataChangedError, SamplingError
from data_pipeline.ledger import Ledger
from data_pipeline.mixture import CYCLE, MixtureStream
from data_pipeline.samples import SampleStream
from data_pipeline.stream import TokenStream


def open_recipe(
    recipe: Mapping[str, Any], cache: ShardCache | None = None, skip_corrupt: Ledger | None = None
) -> SampleStream:
    """The stream that gave this `SampleStream.recipe`, opened again.

    Raises:
        DataChangedError: the data are others now.
        DataError: they are not where they were, or cannot be used.
    """
    opened = _open_mixture if recipe["kind"] == "mixture" else _open_tokens
    stream = opened(recipe, cache, skip_corrupt)
    if stream.fingerprint != recipe["fingerprint"]:
        raise DataChangedError(f"the data of {recipe} have changed since: restore them to look into them.")
    return stream


def _open_tokens(recipe: Mapping[str, Any], cache: ShardCache | None, skip_corrupt: Ledger | None) -> SampleStream:
    return TokenStream(
        recipe["manifest"],
        recipe["seq_length"],
        recipe["seed"],
        shuffle=recipe["shuffle"],
        shuffle_shards=recipe["shuffle_shards"],
        cache=cache,
        skip_corrupt=skip_corrupt,
    )


def _open_mixture(recipe: Mapping[str, Any], cache: ShardCache | None, skip_corrupt: Ledger | None) -> SampleStream:
    datasets = {name: open_recipe(inner, cache, skip_corrupt) for name, inner in recipe["datasets"].items()}
    seq_length = next(iter(datasets.values())).seq_length
    schedule = [
        (phase["first_sample"] * seq_length, {name: places / CYCLE for name, places in phase["places"].items()})
        for phase in recipe["schedule"]
    ]
    return MixtureStream(datasets, schedule, recipe["seed"])


@dataclass(frozen=True)
class Stretch:
    """Data that a run read from some sample on: a stream, or what is known of one that is not open.

    Attributes:
        start: number of the first sample.
        stream: counts its samples from there.
        recipe: to open the stream with, if it is not given; None if nobody recorded it.
    """

    start: int
    stream: SampleStream | None = None
    recipe: Mapping[str, Any] | None = None


class DataHistory:
    """The samples of a run over all changes of its data.

    Args:
        stretches: in order; the first begins at sample 0.
        cache: for data in a store.
        skip_corrupt: go on where a shard of earlier data is corrupt, as the run did.
    """

    def __init__(
        self, stretches: Sequence[Stretch], cache: ShardCache | None = None, skip_corrupt: Ledger | None = None
    ) -> None:
        self._stretches = list(stretches)
        self._cache, self._skip_corrupt = cache, skip_corrupt

    @classmethod
    def of_run(
        cls,
        stream: SampleStream,
        ledger: Ledger,
        cache: ShardCache | None = None,
        skip_corrupt: Ledger | None = None,
    ) -> DataHistory:
        """From the data as configured now, and the transitions in the ledger of the run."""
        stretches, start = [], 0
        transitions = [entry for entry in ledger.entries() if entry["kind"] == "transition"]
        for entry in sorted(transitions, key=lambda entry: int(entry["sample"])):
            stretches.append(Stretch(start, None, entry.get("old_recipe")))
            start = int(entry["sample"])
        return cls([*stretches, Stretch(start, stream)], cache, skip_corrupt)

    def locate(self, number: int) -> tuple[SampleStream, int]:
        """The stream that sample ``number`` of the run comes from, and its number there."""
        if number < 0:
            raise SamplingError(f"sample {number} does not exist: the first is 0.")
        index = max(i for i, stretch in enumerate(self._stretches) if stretch.start <= number)
        stretch = self._stretches[index]
        stream = stretch.stream or self._open(stretch)
        self._stretches[index] = Stretch(stretch.start, stream)
        return stream, number - stretch.start

    def _open(self, stretch: Stretch) -> SampleStream:
        if stretch.recipe is None:
            raise DataChangedError(
                f"the samples from {stretch.start} on belong to earlier data, and the ledger of the run does not say where "
                f"they lie."
            )
        return open_recipe(stretch.recipe, self._cache, self._skip_corrupt)

    def documents(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """The documents that samples are made of, each once, with provenance and the samples it is in."""
        found: dict[tuple[int, str, str, int], dict[str, Any]] = {}
        for number in numbers:
            stream, local = self.locate(number)
            for span in stream.documents(local):
                key = (id(stream), span.dataset, span.shard, span.document)
                if key not in found:
                    where = {"dataset": span.dataset} if span.dataset else {}
                    found[key] = {
                        **where, "shard": span.shard, "document": span.document, "samples": [], **stream.provenance(span),
                    }  # fmt: skip
                samples = found[key]["samples"]
                if not samples or samples[-1] != number:
                    samples.append(number)
        return list(found.values())
