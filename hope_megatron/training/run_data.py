"""Questions about the data of a run: which samples a step took, and which documents they are made of. No torch."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path

from data_pipeline import DataHistory
from data_pipeline.errors import SamplingError
from data_pipeline.ledger import UnwrittenLedger
from data_pipeline.manifest import MANIFEST_NAME
from hope_megatron.config import RunConfig, load_run_config
from hope_megatron.config.changes import settings_changes
from hope_megatron.training.history import read_history
from hope_megatron.training.metrics import read_metrics
from hope_megatron.training.run_directory import RunDirectory
from hope_megatron.training.sources import open_sources, shard_cache

_BATCH = "training.global_batch_size"


class RunData:
    """The samples of a run, as it read them and as it will.

    Attributes:
        history: its samples, over mixtures and all changes of the data.
        tokenizer_path: of the tokenizer.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory) -> None:
        ledger = UnwrittenLedger(directory.data_ledger)
        stream, _ = open_sources(config, ledger)
        skip_corrupt = ledger if config.data.on_corrupt == "skip" else None
        self.history = DataHistory.of_run(stream, ledger, shard_cache(config.data), skip_corrupt)
        self.tokenizer_path = str(config.data.tokenizer)
        self._batch = config.training.global_batch_size
        self._consumed = samples_consumed(directory)

    def samples_of_step(self, step: int) -> range:
        """Numbers of the samples of a step, counted from 1; see `samples_of_step`."""
        return samples_of_step(step, self._consumed, self._batch)


def samples_consumed(directory: RunDirectory) -> list[tuple[int, int]]:
    """(steps done, samples consumed) in order: of every record, and of every step after which the batch size changed.

    A resumed run need not have a record of the step that it went on from, so changes come from its history.
    """
    consumed = [(0, 0)]
    for record in read_metrics(directory.metrics):
        if "train/samples" in record:
            consumed.append((int(record["step"]), int(record["train/samples"])))
    for step, changes in settings_changes(read_history(directory)):
        at = bisect.bisect_left(consumed, (step,))
        if _BATCH in changes and (at == len(consumed) or consumed[at][0] > step):
            steps, samples = consumed[at - 1]
            consumed.insert(at, (step, samples + (step - steps) * int(changes[_BATCH][0])))
    return consumed


def samples_of_step(step: int, consumed: Sequence[tuple[int, int]], batch: int) -> range:
    """Numbers of the samples of a step.

    Args:
        step: counted from 1.
        consumed: what `samples_consumed` gave; between two entries all batches are of one size.
        batch: samples of a step beyond them.

    Raises:
        SamplingError: there is no such step, or the batch size changed between two entries around it.
    """
    if step < 1:
        raise SamplingError(f"step {step} does not exist: the first is 1.")
    after = bisect.bisect_left(consumed, (step,))
    steps, samples = consumed[after - 1]
    if after < len(consumed):
        later_steps, later_samples = consumed[after]
        batch, rest = divmod(later_samples - samples, later_steps - steps)
        if rest:
            raise SamplingError(
                f"the batch size changed between the recorded steps {steps} and {later_steps}: ask for a step beside them."
            )
    first = samples + (step - 1 - steps) * batch
    return range(first, first + batch)


def open_run(path: str) -> RunData:
    """A run by its directory, or by its run file.

    Raises:
        ConfigError, DataError: it is neither, or its data cannot be used.
    """
    directory = RunDirectory(Path(path))
    if directory.config.is_file():
        return RunData(load_run_config(directory.config), directory)
    if Path(path).name == MANIFEST_NAME or [*Path(path).glob(MANIFEST_NAME), *Path(path).glob(f"*/{MANIFEST_NAME}")]:
        raise SamplingError(
            f"{path} is a data set; which of it a step or a sample reads depends on the run: "
            "give the run's directory or its run file."
        )
    config = load_run_config(path)
    return RunData(config, RunDirectory(config.run_dir))
