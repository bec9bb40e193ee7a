"""How much of a job's time trains: failures, checkpoints and restarts, in closed form.

Failures are a Poisson process of mean time M between them. Of every interval of tau seconds of training, a save stalls delta;
a failure costs its detection, the restart, and the work since the last checkpoint that was whole. J. T. Daly, "A higher order
estimate of the optimum checkpoint interval for restart dumps", FGCS 22 (2006), equations 20 (expected time) and 37 (interval).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from hope_megatron.config.base import ConfigError

_UNITS = {"h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_PATTERN = re.compile(r"(?P<count>\d+(?:\.\d+)?)/(?P<time>\d+(?:\.\d+)?)?(?P<unit>[hdw])-per-(?P<what>node|job)")


@dataclass(frozen=True)
class Faults:
    """What a fault costs, in seconds. The defaults are this project's promises, not measurements on a large cluster."""

    detect_s: float = 30.0
    """Until it is seen: at once for a killed rank, resilience.hang.min_s for a hanging one."""
    restart_s: float = 60.0
    """From there to the next step: node check, imports, rendezvous, loading a checkpoint."""
    stall_s: float = 1.0
    """What training waits for in a save."""
    write_s: float = 15.0
    """Until a save that has begun is whole on disk; a fault before that goes back to the one before it."""


@dataclass(frozen=True)
class Goodput:
    """Expected shares of a job's time; they sum to 1."""

    mtbf_s: float
    """Mean time between failures of the whole job."""
    interval_s: float
    """Seconds of training between saves."""
    productive: float
    """Share in which new steps are done."""
    saves: float
    """What training waits for in saves."""
    redone: float
    """Work since the last whole checkpoint, done again."""
    detection: float
    """Until faults are seen."""
    restarts: float
    """From there to the next step."""


def parse_failures(text: str, num_nodes: int) -> float:
    """Mean seconds between failures of a job on so many nodes, from `1/264d-per-node` or `1/8h-per-job`.

    Raises:
        ConfigError: it is not of that form.
    """
    match = _PATTERN.fullmatch(text)
    if match is None or float(match["count"]) <= 0 or float(match["time"] or 1) <= 0:
        raise ConfigError(f"--failures {text!r} is not of the form 1/264d-per-node (h, d or w; node or job)")
    seconds = float(match["time"] or 1) * _UNITS[match["unit"]] / float(match["count"])
    return seconds / num_nodes if match["what"] == "node" else seconds


def optimal_interval_s(mtbf_s: float, stall_s: float) -> float:
    """Seconds of training between saves that lose the least (Daly's equation 37)."""
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = stall_s / (2 * mtbf_s)
    return math.sqrt(2 * stall_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_s


def expected_goodput(mtbf_s: float, faults: Faults, interval_s: float | None = None) -> Goodput:
    """Shares of a long job's time.

    Args:
        mtbf_s: mean time between failures of the job.
        faults: what each costs.
        interval_s: seconds of training between saves; None is the best.
    """
    interval = optimal_interval_s(mtbf_s, faults.stall_s) if interval_s is None else interval_s
    segment = interval + faults.stall_s
    # Expected time per interval of training: a segment is repeated until none of its seconds meets a failure; each failure
    # costs detection, restart and the seconds in which the save before it was not whole yet.
    overhead = faults.detect_s + faults.restart_s + min(faults.write_s, interval)
    attempts = math.expm1(segment / mtbf_s)  # expected failures per segment
    total = attempts * (mtbf_s + overhead)
    redone = attempts * mtbf_s - segment + attempts * min(faults.write_s, interval)
    return Goodput(
        mtbf_s=mtbf_s,
        interval_s=interval,
        productive=interval / total,
        saves=faults.stall_s / total,
        redone=redone / total,
        detection=attempts * faults.detect_s / total,
        restarts=attempts * faults.restart_s / total,
    )
