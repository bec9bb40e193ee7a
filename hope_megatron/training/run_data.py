"""Questions about the data of a run: which samples a step took, and which documents they are made of. No torch."""

from __future__ import annotations

import bisect
from pathlib import Path

from data_pipeline import DataHistory
from data_pipeline.errors import SamplingError
from data_pipeline.ledger import UnwrittenLedger
from hope_megatron.config import RunConfig, load_run_config
from hope_megatron.training.metrics import read_metrics
from hope_megatron.training.run_directory import RunDirectory
from hope_megatron.training.sources import open_sources, shard_cache


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
        self._recorded = [(0, 0)]  # (steps done, samples consumed)
        for record in read_metrics(directory.metrics):
            if "train/samples" in record:
                self._recorded.append((int(record["step"]), int(record["train/samples"])))

    def samples_of_step(self, step: int) -> range:
        """Numbers of the samples of a step, counted from 1.

        What the run has recorded decides, so other batch sizes before a resume count; beyond that, the batch size of now.

        Raises:
            SamplingError: there is no such step, or the batch size changed between two records around it.
        """
        if step < 1:
            raise SamplingError(f"step {step} does not exist: the first is 1.")
        after = bisect.bisect_left(self._recorded, (step,))
        steps, samples = self._recorded[after - 1]
        batch = self._batch
        if after < len(self._recorded):
            later_steps, later_samples = self._recorded[after]
            batch, rest = divmod(later_samples - samples, later_steps - steps)
            if rest:
                raise SamplingError(
                    f"the batch size changed between the recorded steps {steps} and {later_steps}: "
                    f"ask for a step beside them."
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
    config = load_run_config(path)
    return RunData(config, RunDirectory(config.run_dir))
