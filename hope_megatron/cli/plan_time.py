"""The time of a step in `hope plan`: by phase, with its bound and an interval; the search for settings; calibration by a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hope_megatron.cli.tables import new_table
from hope_megatron.config.base import ConfigError
from hope_megatron.config.calibration import calibrate, measured_step_s, write_efficiency
from hope_megatron.config.efficiency import Efficiency
from hope_megatron.config.hardware import Hardware
from hope_megatron.config.load import load_run_config
from hope_megatron.config.roofline import LIMIT_IN_WORDS
from hope_megatron.config.run import RunConfig
from hope_megatron.config.step_time import step_time, why_not_counted
from hope_megatron.config.tuning import Choice, best_choices, changed_config
from hope_megatron.runtime.files import write_text
from hope_megatron.runtime.formatting import bytes_text, duration_text, seconds_text
from hope_megatron.runtime.records import parse_records


def print_time(console: Any, time: dict[str, Any], world_size: int) -> None:
    """Phases, bound and interval."""
    if "unknown" in time:
        console.print(f"\ntime by phase unknown: {time['unknown']}; `hope rehearse` counts it", soft_wrap=True)
        return
    columns = ("", "launches", "memory", "math", "small kernels", "network", "takes")
    table = new_table("Time of a step, counted", *columns)
    for name, phase in time["phases"].items():
        keys = ("launch_s", "memory_s", "math_s", "latency_s", "network_s", "total_s")
        table.add_row(name, *(seconds_text(phase[key]) for key in keys))
    console.print("", table)
    rate, hours = time["tokens_per_second_per_gpu"], [time["hours"], *time["hours_interval"]]
    expected, low, high = (duration_text(3600 * x) for x in hours)
    console.print(
        f"step {seconds_text(time['step_s'])}, bound by {LIMIT_IN_WORDS[time['limit']]}: {rate:,.0f} tokens/s per GPU, "
        f"[bold]{expected}[/bold], between {low} and {high} at the ends of the assumed efficiencies (counted, not measured)",
        soft_wrap=True,
    )


def tune(config: RunConfig, world_size: int, hardware: Hardware, efficiency: Efficiency) -> list[Choice]:
    """The best five settings.

    Raises:
        ConfigError: where the closed forms do not hold.
    """
    if (reason := why_not_counted(changed_config(config, {"training.micro_batch_size": 1}))) is not None:
        raise ConfigError(
            f"--tune: {reason}; the closed forms do not hold. Compare settings by hope rehearse --against"
        )
    return best_choices(config, world_size, hardware, efficiency)


def choices_data(choices: list[Choice], world_size: int, beside: Sequence[str] = ()) -> list[dict[str, Any]]:
    """As plain data. beside: overrides that hold for all."""
    return [
        {
            "overrides": [*beside, *choice.overrides],
            "step_s": choice.time.seconds,
            "step_s_interval": [choice.time.fastest_s, choice.time.slowest_s],
            "tokens_per_second_per_gpu": choice.time.tokens_per_second / world_size,
            "bound": choice.time.bound,
            "limit": choice.time.limit,
            "memory_bytes": choice.memory_bytes,
        }
        for choice in choices
    ]


def print_choices(choices: list[dict[str, Any]], own: dict[str, Any] | None, own_length: int) -> None:
    """One line for each, the fastest first. own: the best one at the run's own length, where another was asked for."""
    for number, choice in enumerate(choices, 1):
        print(f"{number}. {_choice_text(choice)}\n   {' '.join(choice['overrides'])}")
    if any("truncate_tokens" in text for text in choices[0]["overrides"]):
        print(
            "nothing fits without windows: gradients reach back training.truncate_tokens only, which changes what is learned"
        )
    if own is not None:
        print(f"at {own_length:,} tokens: {_choice_text(own)}\n   {' '.join(own['overrides'])}")
    print("counted, not measured; hope rehearse with these overrides gives the peak of memory")


def _choice_text(choice: dict[str, Any]) -> str:
    low, high = choice["step_s_interval"]
    return (
        f"{choice['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU, step {seconds_text(choice['step_s'])} "
        f"({seconds_text(low)} to {seconds_text(high)}, bound by {LIMIT_IN_WORDS[choice['limit']]}), "
        f"{bytes_text(choice['memory_bytes'])} without temporaries"
    )


def write_overrides(path: Path, overrides: list[str], title: str) -> None:
    """The winner's settings, as dotted keys of a run file."""
    lines = [f"# {title}", *(f"{text.replace('=', ': ', 1)}" for text in overrides)]
    write_text(path, "\n".join(lines) + "\n")


def calibrate_by(run: Path, world_size: int, hardware: Hardware, out: Path) -> str:
    """Write the efficiencies that a run reached; says what was found.

    Raises:
        ConfigError: if `run` is no run's directory, or its steps cannot be counted.
    """
    for name in ("config.yaml", "metrics.jsonl"):
        if not (run / name).is_file():
            raise ConfigError(f"--calibrate {run}: it has no {name}; give the directory of a run")
    config = load_run_config(run / "config.yaml")
    if (reason := why_not_counted(config)) is not None:
        raise ConfigError(f"--calibrate {run}: {reason}; the closed forms do not hold")
    step_s = measured_step_s(parse_records((run / "metrics.jsonl").read_bytes())[0], config)
    planned = step_time(config, world_size, hardware).seconds
    write_efficiency(out, calibrate(config, world_size, hardware, step_s), f"{run}, {world_size} x {hardware.name}")
    return f"measured {seconds_text(step_s)} a step where {seconds_text(planned)} were planned; written: {out}"
