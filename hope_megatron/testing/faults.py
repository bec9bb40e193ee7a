"""Faults on order, for drills: `HOPE_FAULTS=kill@1:37:backward,nan@0:50` makes rank 1 die in the backward pass of step 37.

    KIND@RANK:STEP[:PHASE][*]

PHASE is one of a step (`before step`, data, forward, backward, agree, step, `after step`, evaluate, save), with spaces or dashes;
without it the kind's own (below). With a phase of the start (data, imports, rendezvous, model, checkpoint, first_step) the fault
comes while a process starts, once the newest checkpoint is of STEP or later. A fault comes once in the life of a run, however
often the step is done again; with `*` always.

| kind | what happens to the rank | phase |
|---|---|---|
| kill, segv | SIGKILL, SIGSEGV | forward |
| stop | SIGSTOP: it stands still | forward |
| hang | it waits for ever, outside of any collective | forward |
| gil | it hangs and holds the interpreter's lock | forward |
| collective | it waits in a collective that nobody else joins | forward |
| raise, io, network | an error of the program; of a disk (EIO); of the network (ECONNRESET) | forward |
| nan, inf | one element of its gradient is not a number, or infinite | step |
| huge | its gradient is a million times too large | step |
| flip-gradient, flip-parameter, flip-optimizer, flip-activation | one high bit of one element | step, before-step, forward |
| slow | every forward pass takes 0.3 s longer, for 60 steps | forward |
| disk | no file may grow for 2 s (a full disk) | after step |
| damage | a file of the newest checkpoint is damaged, and the rank is killed | after step |
| litter | half a checkpoint lies in the directory, and the rank is killed | after step |
| node | SIGKILL to this rank, its supervisor and all that the supervisor started | forward |
| term | SIGTERM to the supervisor: somebody ends the run | forward |
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import re
import resource
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hope_megatron.config import ConfigError, RunConfig
from hope_megatron.runtime.heartbeat import HEART
from hope_megatron.runtime.process import SUPERVISOR_VARIABLE
from hope_megatron.testing.mutations import damage
from launch.attempts import newest_checkpoint_step

if TYPE_CHECKING:
    from hope_megatron.engine.engine import Engine

FAULTS_VARIABLE = "HOPE_FAULTS"
_PATTERN = re.compile(r"(?P<kind>[a-z-]+)@(?P<rank>\d+):(?P<step>\d+)(:(?P<phase>[a-z_ -]+))?(?P<always>\*)?")
_PHASES = {
    "nan": "step", "inf": "step", "huge": "step", "flip-gradient": "step", "flip-parameter": "before step",
    "flip-optimizer": "before step", "disk": "after step", "damage": "after step", "litter": "after step",
}  # fmt: skip
_SLOW_STEPS = 60
_SLOW_S = 0.3
_DISK_S = 2.0


@dataclass(frozen=True)
class Fault:
    """One order."""

    kind: str
    rank: int
    step: int
    phase: str
    always: bool = False

    def __str__(self) -> str:
        return f"{self.kind}@{self.rank}:{self.step}:{self.phase.replace(' ', '-')}" + ("*" if self.always else "")


def parse_faults(text: str) -> list[Fault]:
    """The faults that a variable orders.

    Raises:
        ConfigError: naming the part that is none.
    """
    found = []
    for part in filter(None, (item.strip() for item in text.split(","))):
        match = _PATTERN.fullmatch(part)
        if match is None or match["kind"] not in KINDS:
            raise ConfigError(
                f"{FAULTS_VARIABLE}: {part!r} is not KIND@RANK:STEP[:PHASE] with one of {', '.join(sorted(KINDS))}"
            )
        phase = (match["phase"] or _PHASES.get(match["kind"], "forward")).replace("-", " ")
        found.append(Fault(match["kind"], int(match["rank"]), int(match["step"]), phase, bool(match["always"])))
    return found


def install_faults(config: RunConfig) -> Injector:
    """Inject what the environment orders into this process.

    Raises:
        ConfigError: outside of tests, unless `resilience.allow_faults` says so.
    """
    if not (config.resilience.allow_faults or "PYTEST_CURRENT_TEST" in os.environ):
        raise ConfigError(
            f"{FAULTS_VARIABLE} is set, which breaks runs on purpose; unset it, or say resilience.allow_faults=true for a drill"
        )
    injector = Injector(parse_faults(os.environ[FAULTS_VARIABLE]), int(os.environ.get("RANK", 0)), config.run_dir)
    HEART.listeners.insert(0, injector)
    return injector


class Injector:
    """Waits for the places of its rank's faults; `engine` is set when there is one."""

    def __init__(self, faults: list[Fault], rank: int, run_dir: Path) -> None:
        self.faults = [(number, fault) for number, fault in enumerate(faults) if fault.rank == rank]
        self.run_dir, self.state = run_dir, run_dir / "launch" / "faults"
        self.engine: Engine | None = None
        self.slow_until = 0

    def __call__(self, phase: str, step: int) -> None:
        if phase == "forward" and step <= self.slow_until:
            time.sleep(_SLOW_S)
        for number, fault in self.faults:
            if self._is_here(fault, phase, step) and (fault.always or self._first_time(number, fault)):
                KINDS[fault.kind](self, fault)

    def _is_here(self, fault: Fault, phase: str, step: int) -> bool:
        if fault.phase != phase:
            return False
        return fault.step == step if step else newest_checkpoint_step(self.run_dir) >= fault.step

    def _first_time(self, number: int, fault: Fault) -> bool:
        """Whether a fault has not come yet in the life of the run; from now on it has."""
        self.state.mkdir(parents=True, exist_ok=True)
        try:  # an empty file, which a full disk allows too; its time is the fault's
            os.close(os.open(self.state / f"{number:04d}", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


# -- what happens ------------------------------------------------------------------------------------------------


def _signal(number: int) -> Callable[[Injector, Fault], None]:
    def send(injector: Injector, fault: Fault) -> None:
        os.kill(os.getpid(), number)

    return send


def _hang(injector: Injector, fault: Fault) -> None:
    threading.Event().wait()


def _hold_the_interpreter(injector: Injector, fault: Fault) -> None:
    ctypes.PyDLL(None).sleep(100_000)


def _wait_alone(injector: Injector, fault: Fault) -> None:
    import torch.distributed as dist

    if dist.get_world_size() == 1:
        _hang(injector, fault)
    dist.barrier()


def _raise(injector: Injector, fault: Fault) -> None:
    raise RuntimeError(f"ordered: {fault}")


def _os_error(number: int) -> Callable[[Injector, Fault], None]:
    def fail(injector: Injector, fault: Fault) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def _gradients(injector: Injector) -> list[Any]:
    assert injector.engine is not None
    return injector.engine.gradient_shards()


def _fill(value: float) -> Callable[[Injector, Fault], None]:
    def fill(injector: Injector, fault: Fault) -> None:
        gradient = max(_gradients(injector), key=lambda tensor: tensor.numel())
        gradient.view(-1)[gradient.numel() // 2] = value

    return fill


def _scale(injector: Injector, fault: Fault) -> None:
    for gradient in _gradients(injector):
        gradient.mul_(1e6)


def _flip(tensor: Any) -> None:
    """The lowest bit of the exponent of one element: half or twice its value."""
    import torch

    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().view(-1)
    integers = flat.view(torch.int32) if flat.dtype == torch.float32 else flat.view(torch.int16)
    integers[flat.numel() // 2] ^= 1 << (23 if flat.dtype == torch.float32 else 7)


def _flip_gradient(injector: Injector, fault: Fault) -> None:
    _flip(max(_gradients(injector), key=lambda tensor: tensor.numel()))


def _flip_parameter(injector: Injector, fault: Fault) -> None:
    assert injector.engine is not None
    _flip(max((p for p in injector.engine.model.parameters() if p.numel()), key=lambda p: p.numel()))


def _flip_optimizer(injector: Injector, fault: Fault) -> None:
    from hope_megatron.checkpoint.shards import live_shards

    assert injector.engine is not None
    tensors = [t for piece in live_shards(injector.engine) for name, t in piece.tensors.items() if name != "master"]
    _flip(max(tensors, key=lambda tensor: tensor.numel()))


def _flip_activation(injector: Injector, fault: Fault) -> None:
    """One element of the first layer's output, in the next forward pass."""
    assert injector.engine is not None
    layer = injector.engine.model.layers[0]

    def flip(module: Any, inputs: Any, output: Any) -> None:
        handle.remove()
        _flip(next(value for value in (output if isinstance(output, tuple) else (output,)) if hasattr(value, "detach")))

    handle = layer.register_forward_hook(flip)


def _slow(injector: Injector, fault: Fault) -> None:
    injector.slow_until = fault.step + _SLOW_STEPS


def _full_disk(injector: Injector, fault: Fault) -> None:
    """The kernel refuses to let any file of this process grow; in time it lets it again."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    timer = threading.Timer(_DISK_S, resource.setrlimit, (resource.RLIMIT_FSIZE, (hard, hard)))
    timer.daemon = True
    timer.start()


def _damage_checkpoint(injector: Injector, fault: Fault) -> None:
    found = sorted((injector.run_dir / "checkpoints").glob("step-*/manifest.json"))
    if len(found) > 1:  # the only one there is must come from a copy: that is a person's work
        damage(found[-1].parent, random.Random(fault.step))
    os.kill(os.getpid(), signal.SIGKILL)


def _litter(injector: Injector, fault: Fault) -> None:
    junk = injector.run_dir / "checkpoints" / f"step-{90_000_000 + fault.step:08d}"
    junk.mkdir(parents=True, exist_ok=True)
    (junk / "rank-00000.safetensors").write_bytes(b"half of what was to be written")
    (injector.run_dir / "checkpoints" / ".tmp-step-00000001").mkdir(exist_ok=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _end_supervisor(injector: Injector, fault: Fault) -> None:
    os.kill(int(os.environ[SUPERVISOR_VARIABLE]), signal.SIGTERM)


def _kill_node(injector: Injector, fault: Fault) -> None:
    os.kill(int(os.environ[SUPERVISOR_VARIABLE]), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


KINDS: dict[str, Callable[[Injector, Fault], None]] = {
    "kill": _signal(signal.SIGKILL),
    "segv": _signal(signal.SIGSEGV),
    "stop": _signal(signal.SIGSTOP),
    "hang": _hang,
    "gil": _hold_the_interpreter,
    "collective": _wait_alone,
    "raise": _raise,
    "io": _os_error(errno.EIO),
    "network": _os_error(errno.ECONNRESET),
    "nan": _fill(float("nan")),
    "inf": _fill(float("inf")),
    "huge": _scale,
    "flip-gradient": _flip_gradient,
    "flip-parameter": _flip_parameter,
    "flip-optimizer": _flip_optimizer,
    "flip-activation": _flip_activation,
    "slow": _slow,
    "disk": _full_disk,
    "damage": _damage_checkpoint,
    "litter": _litter,
    "node": _kill_node,
    "term": _end_supervisor,
}
