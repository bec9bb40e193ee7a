"""Trackers, each read back by its own library's reader, and several at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hope_megatron.config import ConfigError, TrackingConfig
from hope_megatron.config.trackers import TRACKERS
from hope_megatron.testing.tiny import tiny_run_config
from hope_megatron.training import mlflow_client
from hope_megatron.training.metrics import MetricsFile
from hope_megatron.training.run_directory import RunDirectory
from hope_megatron.training.sinks.base import TrackingError
from hope_megatron.training.tracking import Trackers, check_tracking


def train_and_resume(root: Path, *sinks: str, **keys: object) -> RunDirectory:
    """Steps 1 to 3, an end by a signal, and steps 3 and 4 after a resume from step 2."""
    tracking = TrackingConfig(sinks=sinks, experiment="memory", tags={"team": "a"}, **keys)
    config = tiny_run_config(output_dir=root).model_copy(update={"tracking": tracking})
    check_tracking(config)
    directory = RunDirectory(config.run_dir)
    directory.path.mkdir(parents=True)
    metrics = MetricsFile(directory.metrics)
    for steps, status in (((1, 2, 3), "KILLED"), ((3, 4), "FINISHED")):
        trackers = Trackers(config, directory, {"commit": "abc"})
        metrics.drop_after(2)
        for step in steps:
            metrics.append(step, {"train/loss": 1 / step, "bad": float("nan"), "time/unix_s": 1e9 + step})
            trackers.notify()
        directory.summary.write_text("{}")
        assert trackers.close(status, [directory.summary, directory.curves], timeout_s=120)
    return directory


EXPECTED = [(step, 1 / step) for step in (1, 2, 3, 4)]


def test_tensorboard_reads_one_run(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    directory = train_and_resume(tmp_path, "tensorboard")
    events = loader.EventAccumulator(str(directory.path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["time/unix_s", "train/loss"]
    found = events.Scalars("train/loss")
    assert [(event.step, round(event.value, 6)) for event in found] == [
        (step, round(loss, 6)) for step, loss in EXPECTED
    ]
    assert [event.wall_time for event in found] == [1e9 + step for step in (1, 2, 3, 4)]


def test_json_lines(tmp_path):
    directory = train_and_resume(tmp_path, "jsonl", jsonl_file=tmp_path / "all" / "runs.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "all" / "runs.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", *["metrics"] * 3, "end", "start", "metrics", "end"]
    assert [(line["step"], line["train/loss"]) for line in lines if line["event"] == "metrics"] == EXPECTED
    assert {line["run"] for line in lines} == {"tiny"} and "bad" not in lines[1]
    assert lines[0]["tags"] == {"commit": "abc"} and lines[0]["config"]["optim"]["name"] == "m3"
    assert (lines[4]["status"], lines[-1]["status"]) == ("KILLED", "FINISHED")
    assert lines[-1]["files"] == [str(directory.summary)]


def wandb_records(path: Path) -> list:
    """Records of an offline run: protobuf messages of wandb in LevelDB's log format (7 bytes of header per piece)."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, position, records, whole = path.read_bytes(), 7, [], b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            records.append(messages.Record.FromString(whole))
            whole = b""
    return records


def wandb_history(files: list[Path]) -> list[tuple[int, float]]:
    history = []
    for record in (record for file in files for record in wandb_records(file)):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            history.append((int(items["_step"]), float(items["train/loss"])))
    return history


def test_wandb_offline_goes_on_with_its_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    directory = train_and_resume(tmp_path, "wandb")
    files = sorted(directory.path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    records = [record for file in files for record in wandb_records(file)]
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {json.loads((directory.path / "tracking-wandb.json").read_text())["run_id"]}
    assert runs[0].project == "memory" and runs[0].display_name == "tiny" and list(runs[0].tags) == ["team:a"]
    deadline = time.monotonic() + 30  # its writer is a process of its own
    while wandb_history(files) != EXPECTED and time.monotonic() < deadline:
        time.sleep(0.2)
    assert wandb_history(files) == EXPECTED
    assert list(directory.path.glob("wandb/offline-run-*/files/summary.json"))


def test_wandb_without_a_key_is_one_line_before_training(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = tiny_run_config(output_dir=tmp_path).model_copy(update={"tracking": TrackingConfig(sinks=("wandb",))})
    with pytest.raises(TrackingError, match=r"no key for https://api.wandb.ai.*wandb login.*WANDB_MODE=offline"):
        check_tracking(config)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    check_tracking(config)


def test_mlflow_variables_and_several_at_once(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from-the-shell")
    plain = tiny_run_config(output_dir=tmp_path).model_copy(update={"tracking": TrackingConfig()})
    assert mlflow_client.experiment_name(plain) == "from-the-shell"
    directory = train_and_resume(tmp_path, "mlflow", "jsonl")
    client = MlflowClient(tracking_uri=uri)
    run = client.search_runs([client.get_experiment_by_name("memory").experiment_id])[0]
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == EXPECTED
    assert len((directory.path / "tracking.jsonl").read_text().splitlines()) == 8


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """The address of MLflow's own server, with a database and artifacts of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = [f"--backend-store-uri=sqlite:///{tmp_path}/server.db", f"--artifacts-destination={tmp_path}/artifacts"]
    command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1", *store]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
    try:
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            assert server.poll() is None and time.monotonic() < deadline, "MLflow's server did not start"
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.timeout(180)
def test_a_real_mlflow_server_has_the_whole_run(tmp_path, mlflow_server):
    from mlflow.tracking import MlflowClient

    directory = train_and_resume(tmp_path, "mlflow", uri=mlflow_server)
    client = MlflowClient(tracking_uri=mlflow_server)
    (run,) = client.search_runs([client.get_experiment_by_name("memory").experiment_id])
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == EXPECTED
    assert run.info.status == "FINISHED" and run.data.tags["team"] == "a" and run.data.params["optim.name"] == "m3"
    assert directory.summary.name in {file.path.split("/")[-1] for file in client.list_artifacts(run.info.run_id)}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"sinks": ("wandbb",)}, "did you mean wandb"),
        ({"sinks": ("jsonl", "jsonl")}, "twice"),
        ({"sinks": ("mlflow",), "mlflow": False}, "tracking.mlflow=false"),
        ({"sinks": ("wandb",), "uri": "http://x"}, "tracking.sinks has no mlflow"),
        ({"jsonl_file": Path("x")}, "tracking.sinks has no jsonl"),
    ],
)
def test_contradictions_are_refused(keys, words):
    with pytest.raises((ConfigError, ValueError), match=words):
        TrackingConfig(**keys)


def test_the_old_key_goes_on_working():
    assert TrackingConfig().names == ("mlflow",) and TrackingConfig(mlflow=False).names == ()
    assert set(TRACKERS) == {"mlflow", "wandb", "tensorboard", "jsonl"}
