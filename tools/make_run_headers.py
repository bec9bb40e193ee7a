"""Write the lines `# Time:` of run files from the closed forms of `hope plan`. Run it when a run file or the plan changes."""

from __future__ import annotations

import re

from hope_megatron.config import load_run_config
from hope_megatron.config.hardware import find_hardware
from hope_megatron.config.presets import config_names, find_config
from hope_megatron.config.step_time import step_time

HARDWARE = re.compile(r"^# Hardware: (\d+) x (\w+)", re.MULTILINE)
TIME = re.compile(r"^# Time: .*\n(?:#   .*\n)*", re.MULTILINE)


def time_lines(name: str, devices: int, hardware_name: str) -> str:
    """The lines of a run file about its time."""
    config = load_run_config(name)
    found = step_time(config, devices, find_hardware(hardware_name))
    hours = [seconds * config.training.steps / 3600 for seconds in (found.seconds, found.fastest_s, found.slowest_s)]
    about, low, high = (f"{x:.0f}" if x >= 10 else f"{x:.1f}" for x in hours)
    lines = (
        f"# Time: about {about} hours by `hope plan`, {low} to {high}; bound by {found.bound}. Counted, not measured.\n"
    )
    if "memory" in config.model.mixers:
        lines += "#   It is that of the Triton kernels of the memories, which no GPU has run.\n"
    return lines


def main() -> None:
    for name in config_names("runs"):
        path = find_config(name, "runs")
        text = path.read_text(encoding="utf-8")
        devices = HARDWARE.search(text)
        if devices is not None and TIME.search(text) is not None:
            path.write_text(TIME.sub(time_lines(name, int(devices[1]), devices[2]), text, count=1), encoding="utf-8")


if __name__ == "__main__":
    main()
