"""What a run says about its speed, and about a GPU that is full."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from hope_megatron.config.accounting import forward_flops
from hope_megatron.config.hardware import HARDWARE
from hope_megatron.config.training import ProfileConfig
from hope_megatron.parallel.distributed import init_distributed
from hope_megatron.testing.tiny import tiny_run_config
from hope_megatron.training.out_of_memory import advice, explained
from hope_megatron.training.profiling import Profiling, due
from hope_megatron.training.speed import hardware_of, memory_bytes, speed_metrics, utilization


def test_utilization_is_that_of_the_closed_forms():
    config = tiny_run_config(training={"recompute": "layer"})
    found = utilization(config, 1e6, HARDWARE["h100"])
    flops = 3 * forward_flops(config.model, config.training.seq_length).total
    assert found["speed/mfu"] == pytest.approx(1e6 * flops / 989.4e12)
    assert found["speed/mfu"] == pytest.approx(found["speed/mfu_outer"] + found["speed/mfu_inner"])
    assert found["speed/hfu"] > found["speed/mfu"]


@pytest.mark.parametrize(
    ("name", "row"), [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("Tesla T4", None)]
)
def test_devices_are_found_by_their_names(name, row):
    assert hardware_of(name) is (None if row is None else HARDWARE[row])


def test_a_cpu_has_no_peak_to_be_measured_against():
    cpu = torch.device("cpu")
    assert speed_metrics(tiny_run_config(), 500.0, 2, cpu) == {"speed/tokens_per_s_per_gpu": 250.0}
    assert memory_bytes(cpu) == {}


def test_out_of_memory_says_what_was_planned_and_what_to_change():
    config = tiny_run_config(training={"global_batch_size": 8, "micro_batch_size": 4})
    error = explained(torch.OutOfMemoryError("CUDA out of memory. Tried"), config, 1, 3, None)
    assert "rank 3 ran out of GPU memory: CUDA out of memory" in str(error) and "`hope plan` counts" in str(error)
    assert advice(config)[:2] == ["training.micro_batch_size=2 (the global batch stays)", "training.recompute=layer"]


def test_a_chosen_step_leaves_a_trace(tmp_path):
    config = tiny_run_config()
    config = config.model_copy(
        update={"training": config.training.model_copy(update={"profile": ProfileConfig(steps=(3,))})}
    )
    mesh = init_distributed(config.parallel)
    run = SimpleNamespace(
        config=config,
        state=SimpleNamespace(step=2),
        engine=SimpleNamespace(mesh=mesh),
        directory=SimpleNamespace(path=tmp_path),
    )
    callback = Profiling()
    callback.start(run)
    callback.before_step(run)
    torch.ones(8) @ torch.ones(8)
    run.state.step = 3
    callback.after_step(run, None)
    trace = json.loads((tmp_path / "profile" / "step_3_rank_0.json").read_text())
    assert any(event.get("name") == "aten::dot" for event in trace["traceEvents"])
    assert not due(config, 4, 0) and not due(config, 3, 1)
