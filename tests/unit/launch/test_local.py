"""Refusals before any process is started."""

from __future__ import annotations

import socket

import pytest

from hope_megatron.runtime.process import available_cpus
from launch.errors import LaunchError
from launch.local import run_local


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_more_processes_than_cores_are_refused():
    with pytest.raises(LaunchError, match=r"--nproc 1000.*--oversubscribe"):
        run_local(["train"], 1000)


def test_no_process_at_all_is_refused():
    with pytest.raises(LaunchError, match="at least one"):
        run_local(["train"], 0)


def test_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(LaunchError, match=f"--port {port} cannot be used"):
            run_local(["train"], available_cpus(), port=port)
