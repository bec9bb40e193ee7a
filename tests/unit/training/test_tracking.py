"""MLflow gets every record once, and a dead server costs nothing."""

from __future__ import annotations

import socket
import threading
import time
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hope_megatron.config import TrackingConfig
from hope_megatron.testing.tiny import tiny_run_config
from hope_megatron.training.metrics import MetricsFile
from hope_megatron.training.mlflow_client import TrackingError, default_uri, open_experiment
from hope_megatron.training.run_directory import RunDirectory
from hope_megatron.training.tracking import Tracker, check_tracking, log_evaluation, read_tracking


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
    tracker = Tracker(config, directory, tags={"settings from step 3": "optim.lr 0.01 -> 0.5"})
    assert tracker.close("FINISHED", [directory.summary, directory.curves], timeout_s=120)

    client = MlflowClient(tracking_uri=default_uri(tmp_path))
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "tiny" and run.data.tags["commit"] == "abc"
    assert run.data.tags["settings from step 3"] == "optim.lr 0.01 -> 0.5"
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


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("./mlruns", "MLflow keeps no runs in a plain directory"),
        ("mlruns", "MLflow keeps no runs in a plain directory"),
        ("file:///tmp/mlruns", "MLflow keeps no runs in a plain directory"),
        ("127.0.0.1:5000", "MLflow keeps no runs in a plain directory"),
        ("nonsense://x", "MLflow has no store for nonsense://"),
        ("s3://bucket/x", "MLflow has no store for s3://"),
        ("http://***@host", "was masked when the configuration was written"),
        ("mysql://alice:s3cret@host/db", "No module named"),
    ],
)
def test_mistakes_are_found_before_training(tmp_path, monkeypatch, uri, message):
    for name in ("URI", "USERNAME"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    config, _, _ = make_run(tmp_path, uri=uri)
    with pytest.raises(TrackingError, match=message) as caught:
        check_tracking(config)
    assert "s3cret" not in str(caught.value) and caught.value.is_user_error


def test_a_file_that_is_no_database_and_one_without_tables(tmp_path):
    (tmp_path / "text.db").write_text("this is text, and longer than the header of a database by far" * 9)
    config, _, _ = make_run(tmp_path, uri=f"sqlite:///{tmp_path}/text.db")
    with pytest.raises(TrackingError, match="is no SQLite database"):
        check_tracking(config)
    for name in ("new.db", "empty.db"):
        (tmp_path / "empty.db").touch()
        check_tracking(config.model_copy(update={"tracking": TrackingConfig(uri=f"sqlite:///{tmp_path}/{name}")}))


def test_a_deleted_experiment_is_the_users_and_lasting(tmp_path, caplog):
    config, directory, metrics = make_run(tmp_path)
    client, experiment_id = open_experiment(default_uri(tmp_path), "hope")
    check_tracking(config)
    client.delete_experiment(experiment_id)
    words = f"'hope' is deleted in MLflow.*restore --experiment-id {experiment_id}.*tracking.experiment"
    with pytest.raises(TrackingError, match=words):
        check_tracking(config)
    metrics.append(1, {"train/loss": 1.0})
    tracker = Tracker(config, directory, tags={})
    tracker._thread.join(60)
    assert not tracker.close("FINISHED", timeout_s=60)
    assert caplog.text.count("does not take this run") == caplog.text.count("is deleted in MLflow") == 1
    assert "tries again" not in caplog.text and "in 60 s" not in caplog.text


class _Unauthorized(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b"You are not authenticated.")

    def log_message(self, *args):
        pass


def test_a_server_that_wants_another_password_is_told_from_one_that_is_away(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), _Unauthorized) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config, _, _ = make_run(tmp_path, uri=f"http://alice:s3cret@127.0.0.1:{server.server_port}")
        with pytest.raises(TrackingError, match="401") as caught:
            check_tracking(config)
        server.shutdown()
    assert "s3cret" not in str(caught.value)
    check_tracking(config)  # nobody listens there now: training begins, and tries again


def test_a_password_reaches_the_client_and_no_file(tmp_path):
    seen = []

    class Server(_Unauthorized):
        def do_GET(self):
            seen.append(self.headers["Authorization"])
            super().do_GET()

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config, directory, _ = make_run(tmp_path, uri=f"http://alice:s3cret@127.0.0.1:{server.server_port}")
        Tracker(config, directory, tags={}).close("FINISHED", timeout_s=60)
        server.shutdown()
    assert b64decode(seen[0].split()[1]) == b"alice:s3cret"
    assert not any("s3cret" in path.read_text() for path in directory.path.rglob("*") if path.is_file())
