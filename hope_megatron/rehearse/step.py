"""One real training step on fake tensors: engine, DeepSpeed, optimizer and `train_step` are those of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from hope_megatron.config.run import RunConfig
from hope_megatron.engine.engine import Engine
from hope_megatron.engine.new_engine import build_engine
from hope_megatron.parallel.distributed import Mesh
from hope_megatron.rehearse.memory import Segment
from hope_megatron.rehearse.tally import Tally
from hope_megatron.rehearse.watch import Watch
from hope_megatron.training.batches import BatchReader
from hope_megatron.training.state import TrainingState
from hope_megatron.training.step import train_step


@dataclass
class Recording:
    """What one step did."""

    passes: list[Tally]
    """Of each micro-batch: forward, backward, and what follows it up to the next."""
    rest: Tally
    """Of everything before the first micro-batch and from the last one's end on."""
    segments: list[Segment]
    """Of the last micro-batch and what follows, in order."""
    at_start: int
    """Bytes alive when the last micro-batch began."""
    alive_at_start: dict[str, int]
    """The same by what it is: weights, gradients, optimizer, other."""


@dataclass
class Stage:
    """An engine in a fake world, and the marks that say where a step is."""

    engine: Engine
    config: RunConfig
    watch: Watch
    state: TrainingState = field(default_factory=TrainingState)
    _pass_marks: list[int] = field(default_factory=list)

    def step(self, lengths: list[int]) -> Recording:
        """One training step with a micro-batch of each of these lengths in tokens."""
        watch, engine = self.watch, self.engine
        engine.accumulation_steps = len(lengths)
        passes: list[Tally] = []
        first_mark, at_start, alive = 0, 0, {}
        before = watch.take()
        forward_backward = engine.forward_backward

        def one_pass(*args: Any) -> Tensor:
            nonlocal before, first_mark, at_start, alive
            before += watch.take() if not passes else Tally()
            if len(passes) == len(lengths) - 1:
                first_mark, at_start = len(watch.memory.marks), watch.memory.live_bytes()
                alive = live_by_kind(engine, watch)
            self._enter("forward", "embedding")
            loss = forward_backward(*args)
            passes.append(watch.take())
            watch.phase = "other"
            return loss

        engine.forward_backward = one_pass  # type: ignore[method-assign,assignment]
        reader = cast(BatchReader, _Reader(lengths, self.config.training.micro_batch_size, engine.mesh))
        watch.phase = "other"
        train_step(engine, reader, self.state, self.config)
        del engine.forward_backward  # type: ignore[method-assign]
        segments = watch.memory.segments(first_mark)
        return Recording(passes, before + watch.take(), segments, at_start, alive)

    def _enter(self, phase: str, place: str) -> None:
        self.watch.phase = self.watch.module = phase
        self.watch.memory.begin(f"{phase}/{place}")


class _Reader:
    """Gives batches of any length, on the device at once."""

    def __init__(self, lengths: list[int], size: int, mesh: Mesh) -> None:
        self._shapes, self._device = [(size, length // mesh.cp_size) for length in lengths], mesh.device

    def take(self, first: int, *, is_last: bool = False) -> list[tuple[Tensor, Tensor]]:
        return [
            (
                torch.zeros(shape, dtype=torch.int64, device=self._device),
                torch.zeros(shape, dtype=torch.int64, device=self._device),
            )
            for shape in self._shapes
        ]

    def documents(self, tokens: Tensor) -> None:
        return None


@contextlib.contextmanager
def staged(config: RunConfig, mesh: Mesh, watch: Watch) -> Iterator[Stage]:
    """Build the engine of a run, with hooks that tell `watch` where a step is."""
    stage = Stage(build_engine(config, mesh), config, watch)
    with contextlib.ExitStack() as stack:
        _mark_modules(stage, stack)
        _mark_backward(stage, stack)
        yield stage


def _mark_modules(stage: Stage, stack: contextlib.ExitStack) -> None:
    """Names of modules for allocations, and segments of the forward pass."""
    watch, model = stage.watch, stage.engine.model
    layers = {layer: f"layer {mixer}" for layer, mixer in zip(model.layers, stage.config.model.mixers)}
    outer: list[str] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        if module in layers:
            if watch.phase == "forward":
                stage._enter("forward", layers[module])
            elif watch.phase == "backward":
                watch.phase = "recompute"
        elif (
            module is model.norm and watch.phase == "forward"
        ):  # the last layer's state is dropped by now, as every layer's is
            stage._enter("forward", "head and loss")
        elif module is model and watch.phase == "reduction":  # the next window of the same sequences
            stage._enter("forward", "embedding")
        outer.append(watch.module)
        watch.module = type(module).__name__

    def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
        watch.module = outer.pop()
        if module not in layers:
            return
        if watch.phase == "recompute":
            watch.phase = "backward"
            return
        if watch.phase != "forward":
            return
        _at_gradient(inputs[0], lambda: stage._enter("backward", "embedding") if module is model.layers[0] else None)
        _at_gradient(outputs[0], lambda: stage._enter("backward", layers[module]))

    stack.enter_context(_removed(torch.nn.modules.module.register_module_forward_pre_hook(enter)))
    stack.enter_context(_removed(torch.nn.modules.module.register_module_forward_hook(leave, always_call=True)))


def _mark_backward(stage: Stage, stack: contextlib.ExitStack) -> None:
    """Segments around autograd's backward, and of the update."""
    from unittest.mock import patch

    watch, run_backward, update = stage.watch, torch.autograd.backward, stage.engine.step

    def backward(*args: Any, **kwargs: Any) -> None:
        stage._enter("backward", "head and loss")
        run_backward(*args, **kwargs)
        stage._enter("reduction", "gradients")

    def step(*args: Any, **kwargs: Any) -> float:
        stage._enter("update", "optimizer")
        norm = update(*args, **kwargs)
        watch.phase = "other"
        return norm

    stack.enter_context(patch.object(torch.autograd, "backward", backward))
    stack.enter_context(patch.object(stage.engine, "step", step))


def _at_gradient(tensor: Tensor, action: Any) -> None:
    if tensor.requires_grad:
        tensor.register_hook(lambda _gradient: action())


@contextlib.contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def live_by_kind(engine: Engine, watch: Watch) -> dict[str, int]:
    """Bytes alive between two micro-batches, by what they are. What no owner claims is "other"."""
    owners: dict[str, list[Tensor]] = {
        "weights": [p.data for p in engine.model.parameters()],
        "gradients": [p.grad for p in engine.model.parameters() if p.grad is not None],
        "optimizer": [],
    }
    for group in engine.optimizer.param_groups:
        owners["optimizer"] += [p.data for p in group["params"]]
    for state in engine.optimizer.state.values():
        owners["optimizer"] += [x for x in state.values() if isinstance(x, Tensor)]
    owners["gradients"] += list(_flat_gradients(engine.zero))
    found: dict[str, int] = {}
    claimed: set[int] = set()
    for name, tensors in owners.items():
        storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
        found[name] = sum(size for key, size in storages.items() if key not in claimed)
        claimed |= set(storages)
    found["other"] = watch.memory.live_bytes() - sum(found.values())
    return found


def _flat_gradients(zero: Any) -> Iterator[Tensor]:
    """The buffers in which DeepSpeed accumulates gradients."""
    for name in ("fp32_groups_gradients_flat", "averaged_gradients", "grad_partitions_flat_buffer", "ipg_buckets"):
        value = getattr(zero, name, None)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            for tensor in item if isinstance(item, (list, tuple)) else [item]:
                if isinstance(tensor, Tensor):
                    yield tensor
