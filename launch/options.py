"""Options of sbatch and srun that a cluster file adds: any of them, but those that the launcher itself decides."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hope_megatron.config.base import ConfigError

Option = str | int | bool
"""A value; true is an option without one, false leaves it away."""

_NAME = re.compile(r"[a-z][a-z0-9-]*")
_KEYS = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "reservation": "reservation",
    "time": "time_limit",
    "exclusive": "exclusive",
    "mem": "memory_per_node_gb",
    "gres": "gpus_per_node and gpu_gres",
    "cpus-per-task": "cpus_per_process",
    "ntasks-per-node": "processes_per_node",
    "container-image": "container.image",
    "container-mounts": "container.mounts",
}
"""Options with a key of their own in the cluster file."""
_OURS = {
    "array", "chdir", "dependency", "distribution", "error", "export", "job-name", "kill-on-bad-exit", "no-requeue", "nodelist",
    "nodes", "ntasks", "open-mode", "output", "overlap", "requeue", "signal", "wrap", "container-workdir", "gpus",
    "gpus-per-node", "gpus-per-task",
}  # fmt: skip
"""Options on which restarting, requeueing and the ranks depend."""


def check_options(section: str, options: Mapping[str, Option]) -> None:
    """Refuse names that are none, and options that something else decides.

    Raises:
        ConfigError: with the key to use instead, if there is one.
    """
    for name, value in options.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{section}: {name!r} is not the long name of an option; write for example mail-user, without dashes"
            )
        if name in _KEYS:
            raise ConfigError(f"{section}: {name} is set by {_KEYS[name]} of the cluster file; use that")
        if name in _OURS:
            raise ConfigError(f"{section}: {name} is set by hope launch itself; leave it out")
        if isinstance(value, str) and not value.isprintable():
            raise ConfigError(f"{section}: {name} has a line break or another control character")


def option_words(options: Mapping[str, Option]) -> list[str]:
    """`--name=value`, or `--name` for true."""
    return [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items() if value is not False
    ]
