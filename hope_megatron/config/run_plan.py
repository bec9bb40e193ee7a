"""All that can be said of a run before it is run, as plain data: parameters, FLOPs, bytes, mesh, time, goodput."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hope_megatron.config.accounting import (
    forward_flops,
    num_non_embedding,
    num_parameters,
    parameters_by_part,
    recompute_flops,
)
from hope_megatron.config.base import ConfigError
from hope_megatron.config.efficiency import DEFAULT, Efficiency
from hope_megatron.config.footprint import estimate, footprint
from hope_megatron.config.goodput import Faults, expected_goodput, parse_failures
from hope_megatron.config.hardware import Hardware, find_hardware
from hope_megatron.config.roofline import seconds_by_limit
from hope_megatron.config.run import RunConfig
from hope_megatron.config.step_time import step_time, why_not_counted


def make_plan(
    config: RunConfig,
    world_size: int,
    hardware_name: str,
    utilization: float | None = None,
    efficiency: Efficiency = DEFAULT,
) -> dict[str, Any]:
    """Everything `hope plan` says, as plain data."""
    model, training = config.model, config.training
    hardware = find_hardware(hardware_name)
    forward = forward_flops(model, training.seq_length)
    recompute = recompute_flops(model, training.seq_length, training.recompute)
    bytes_per_gpu = footprint(config, world_size, on_gpu=hardware_name.lower() != "cpu")
    return {
        "name": config.name,
        "model": model.name,
        "levels": [
            {**level.clock.plan(training.steps), "text": level.period_text}
            | ({"adaptive": True, "updates": None} if level.update_period_adaptive else {"adaptive": False})
            for level in model.cms.levels
        ],
        "parameters": {
            **parameters_by_part(model),
            "total": num_parameters(model),
            "non_embedding": num_non_embedding(model),
        },
        "flops_per_token": {
            "forward": {**asdict(forward), "total": forward.total},
            "backward": {name: 2 * value for name, value in {**asdict(forward), "total": forward.total}.items()},
            "recompute": recompute,
            "total": 3 * forward.total + recompute,
        },
        "bytes_per_gpu": {
            **asdict(bytes_per_gpu),
            "total": bytes_per_gpu.total,
            "capacity": hardware.memory_bytes,
        },
        "mesh": {
            "world_size": world_size,
            "tensor_parallel": config.parallel.tensor_parallel,
            "context_parallel": config.parallel.context_parallel,
            "sequence_parallel": config.parallel.sequence_parallel,
            "data_parallel": config.data_parallel(world_size),
            "zero_stage": config.parallel.zero_stage,
            "accumulation_steps": config.accumulation_steps(world_size),
        },
        "run": {
            "seq_length": training.seq_length,
            "global_batch_size": training.global_batch_size,
            "micro_batch_size": training.micro_batch_size,
            "precision": training.precision,
            "recompute": training.recompute,
            "optimizer": config.optim.name,
            "steps": training.steps,
            "tokens_per_step": training.tokens_per_step,
            "tokens": training.tokens,
            "tokens_per_parameter": training.tokens / num_parameters(model),
        },
        "time": _time(config, world_size, hardware, efficiency, utilization),
        "estimate": {**asdict(estimate(config, world_size, hardware, utilization)), "hardware": asdict(hardware)},
    }


def _time(
    config: RunConfig, world_size: int, hardware: Hardware, efficiency: Efficiency, utilization: float | None
) -> dict[str, Any]:
    if hardware.name.startswith("CPU"):
        return {"unknown": "it is counted for GPUs"}
    if utilization is not None:
        return {"unknown": "--utilization asks for an estimate"}
    return plan_time(config, world_size, hardware, efficiency)


def plan_time(config: RunConfig, world_size: int, hardware: Hardware, efficiency: Efficiency) -> dict[str, Any]:
    """Time of a step as plain data; `unknown` says why it cannot be counted in closed form."""
    if (reason := why_not_counted(config)) is not None:
        return {"unknown": reason}
    found, steps = step_time(config, world_size, hardware, efficiency), config.training.steps
    phases = {
        name: {
            "launch_s": phase.launch,
            "memory_s": phase.memory,
            "math_s": phase.math,
            "latency_s": phase.latency,
            "network_s": phase.network,
            "total_s": phase.total,
        }
        for name, phase in found.phases.items()
    }
    return {
        "phases": phases,
        "bound": found.bound,
        "limit": found.limit,
        "seconds_by_limit": seconds_by_limit(found.phases),
        "step_s": found.seconds,
        "step_s_interval": [found.fastest_s, found.slowest_s],
        "tokens_per_second": found.tokens_per_second,
        "tokens_per_second_per_gpu": found.tokens_per_second / world_size,
        "hours": found.seconds * steps / 3600,
        "hours_interval": [found.fastest_s * steps / 3600, found.slowest_s * steps / 3600],
    }


def plan_goodput(plan: dict[str, Any], failures: str, num_nodes: int, faults: Faults) -> dict[str, Any]:
    """What failures leave of the time, with the best interval between checkpoints."""
    if num_nodes < 1 or min(asdict(faults).values()) < 0:
        raise ConfigError(f"--nodes {num_nodes} and the costs of a fault must be positive")
    found = expected_goodput(parse_failures(failures, num_nodes), faults)
    step_s = plan["time"].get("step_s") or 3600 * plan["estimate"]["hours"] / plan["run"]["steps"]
    every = max(1, round(found.interval_s / step_s))
    return {"num_nodes": num_nodes, **asdict(found), "checkpoint_every": every, "assumed": asdict(faults)}
