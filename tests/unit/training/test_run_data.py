"""Which samples a step of a run took, also where the batch size changed between two records."""

from __future__ import annotations

import pytest

from data_pipeline.errors import SamplingError
from hope_megatron.testing.tiny import tiny_run_config
from hope_megatron.training.history import resumed_history, write_history
from hope_megatron.training.metrics import MetricsFile
from hope_megatron.training.run_data import open_run, samples_consumed, samples_of_step
from hope_megatron.training.run_directory import RunDirectory, RunDirectoryError


@pytest.fixture
def directory(tmp_path):
    """Five steps of 4 samples, five of 8, two of 2; killed and resumed after steps 5 and 10, with a record after step 10 alone."""
    directory, history = RunDirectory(tmp_path), []
    for step, before, after in ((5, 4, 8), (10, 8, 2)):
        old, new = (tiny_run_config(training={"global_batch_size": size}) for size in (before, after))
        saved = {"config": old.model_dump(mode="json"), "layout": {"world_size": 1}, "progress": {"step": step}}
        history, _ = resumed_history({**saved, "history": history}, new, 1)
    write_history(directory.history, new, history)
    MetricsFile(directory.metrics).append(10, {"train/samples": 60})
    return directory


@pytest.mark.parametrize(
    ("step", "first", "size"),
    [(1, 0, 4), (5, 16, 4), (6, 20, 8), (10, 52, 8), (11, 60, 2), (10**12, 60 + 2 * (10**12 - 11), 2)],
)
def test_samples_follow_the_batch_size_of_each_step(directory, step, first, size):
    """60 samples in 10 steps look like batches of 6."""
    assert samples_of_step(step, samples_consumed(directory), 2) == range(first, first + size)


def test_a_change_that_nothing_dates_is_refused(directory):
    directory.history.unlink()
    MetricsFile(directory.metrics).append(13, {"train/samples": 67})
    with pytest.raises(SamplingError, match="changed between the recorded steps 10 and 13"):
        samples_of_step(12, samples_consumed(directory), 2)


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_damaged_history_is_one_line(directory, text):
    directory.history.write_text(text)
    with pytest.raises(RunDirectoryError, match=r"history\.json is damaged"):
        samples_consumed(directory)


@pytest.mark.parametrize("name", ["data", "data/train", "data/train/manifest.json"])
def test_a_data_set_is_no_run(tmp_path, name):
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data/train/manifest.json").write_text("{}")
    with pytest.raises(SamplingError, match=r"is a data set; .* give the run's directory"):
        open_run(str(tmp_path / name))
