"""MLflow gets every record once, and a dead server costs nothing."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from hope_megatron.config import TrackingConfig
from hope_megatron.testing.tiny import tiny_run_config
from hope_megatron.training.metrics import MetricsFile
from hope_megatron.training.run_directory import RunDirectory
from hope_megatron.training.tracking import Tracker, TrackingError, default_uri, log_evaluation, read_tracking


def make_run(tmp_path, uri=None):
    config = tiny_run_config(output_dir=tmp_path).model_copy(update={"tracking": TrackingConfig(uri=uri)})
    directory = RunDirectory(config.run_dir)
    directory.path.mkdir(parents=True)
    return config, directory, MetricsFile(directory.metrics)


def test_resumed_run_continues_the_same_mlflow_run(tmp_path):
    from mlflow.tracking import MlflowClient

    config, directory, metrics = make_run(tmp_path)
    tracker = Tracker(config, directory, tags={"commit": "abc"})
    for step in (1, 2, 3):
        metrics.append(step, {"train/loss": 1.0 / step, "time/unix_s": 1e9 + step})
        tracker.notify()
    assert tracker.close("KILLED", timeout_s=120)
    run_id = read_tracking(directory)["run_id"]

    metrics.drop_after(2)  # a resume from step 2 makes record 3 again
    for step in (3, 4):
        metrics.append(step, {"train/loss": 1.0 / step, "time/unix_s": 1e9 + step})
    directory.summary.write_text("{}")
    tracker = Tracker(config, directory, tags={})
    assert tracker.close("FINISHED", [directory.summary, directory.curves], timeout_s=120)

    client = MlflowClient(tracking_uri=default_uri(tmp_path))
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "tiny" and run.data.tags["commit"] == "abc"
    assert run.data.params["optim.name"] == "m3" and run.data.params["model.cms.levels"].startswith("[")
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "train/loss")] == [
        (s, 1.0 / s) for s in (1, 2, 3, 4)
    ]
    assert [artifact.path for artifact in client.list_artifacts(run_id)] == ["summary.json"]
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_an_evaluation_joins_the_run_and_more_metrics_than_a_request_takes_arrive(tmp_path):
    from mlflow.tracking import MlflowClient

    config, directory, metrics = make_run(tmp_path)
    with pytest.raises(TrackingError, match="without MLflow"):
        log_evaluation(directory, 1, {"eval/loss": 1.0})
    metrics.append(1, {f"memory/drift/layer_{i:04}/mem": float(i) for i in range(1200)})
    assert Tracker(config, directory, tags={}).close("FINISHED", timeout_s=120)
    run_id = log_evaluation(directory, 7, {"eval/loss": 3.5, "eval/perplexity": float("inf")})
    assert run_id == read_tracking(directory)["run_id"]
    client = MlflowClient(tracking_uri=default_uri(tmp_path))
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "eval/loss")] == [(7, 3.5)]
    found = client.get_run(run_id).data.metrics
    assert found["memory/drift/layer_1199/mem"] == 1199.0 and "eval/perplexity" not in found


@pytest.fixture
def silent_server():
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_silent_server_costs_no_training_time(tmp_path, silent_server):
    config, directory, metrics = make_run(tmp_path, uri=silent_server)
    started = time.monotonic()
    tracker = Tracker(config, directory, tags={})
    for step in range(100):
        metrics.append(step, {"train/loss": 1.0})
        tracker.notify()
    assert time.monotonic() - started < 1.0
    started = time.monotonic()
    assert not tracker.close("FINISHED", timeout_s=0.5)
    assert time.monotonic() - started < 2.0
    assert threading.main_thread().is_alive()
    assert len(directory.metrics.read_text().splitlines()) == 100
