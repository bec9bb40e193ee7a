"""A world of any size in one process: tensors without values, peers that are not there.

Everything that is replaced here is put back at the end. What this hides from a rehearsal is said in `verdict.BLIND_SPOTS`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from hope_megatron.engine import engine as engine_module
from hope_megatron.optim.exchange import Communicator, Topology
from hope_megatron.parallel.control import ControlGroup
from hope_megatron.parallel.distributed import Mesh, init_distributed, shutdown_distributed
from hope_megatron.rehearse.fast_fake import FastFake
from hope_megatron.rehearse.watch import Watch, calling_line


def stand_in(tensor: Tensor) -> Any:
    """A value in the place of one that a fake tensor does not have: finite, no overflow, one."""
    frame = sys._getframe(2)
    for _ in range(12):
        if frame is None:
            break
        if "overflow" in frame.f_code.co_name or "invalid" in frame.f_code.co_name:
            return 0
        frame = frame.f_back  # type: ignore[assignment]
    return True if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else 1


@contextlib.contextmanager
def fake_world(parallel: Any, world_size: int, rank: int, watch: Watch) -> Iterator[Mesh]:
    """Be one rank of a world of `world_size`, whose tensors are fake and whose collectives return at once.

    Raises:
        ConfigError: if the world does not divide into the mesh.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {"LOCAL_RANK": "0"}))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        stack.callback(shutdown_distributed)
        mesh = init_distributed(parallel)
        watch.group_names = _group_names(mesh)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        for target, name, replacement in _replacements(mesh, watch):
            stack.enter_context(patch.object(target, name, replacement))
        stack.enter_context(fake)
        stack.enter_context(patch.object(watch, "run", FastFake(fake)))
        stack.enter_context(watch)
        yield mesh


def _group_names(mesh: Mesh) -> dict[tuple[int, ...], str]:
    groups = {"all ranks": mesh.world_group, "data parallel": mesh.dp_group, "tensor parallel": mesh.tp_group}
    names = {tuple(dist.get_process_group_ranks(group)): name for name, group in groups.items()}
    if mesh.cp_size > 1:
        ranks = tuple(dist.get_process_group_ranks(mesh.cp_group))
        names[ranks] = "data = context parallel" if ranks in names else "context parallel"
    return names


def _replacements(mesh: Mesh, watch: Watch) -> Iterator[tuple[Any, str, Any]]:
    """(object, attribute, what stands there in a fake world)."""

    class LonelyControl(ControlGroup):
        """What this rank says is what all say."""

        def __init__(self) -> None:
            self.group, self.rank, self.world_size = None, mesh.rank, mesh.world_size  # type: ignore[assignment]

        def maximum(self, values: Any) -> list[int]:
            watch.tally["agreement", watch.phase, calling_line()] += 1
            return list(values)

        def gather(self, value: Any) -> list[Any]:
            return [value] * self.world_size

        def broadcast(self, value: Any) -> Any:
            return value

        def raise_together(self, error: Exception | None) -> None:
            if error is not None:
                raise error

    def over(cls: type[Communicator], group: Any, dp_rank: int, tp_rank: int) -> Communicator:
        """Peers cannot tell their coordinates; they follow from the mesh, where tensor-parallel ranks are neighbours."""
        comm = cls(group)
        if comm.group is not None:
            ranks = dist.get_process_group_ranks(group)
            comm.topology = Topology(tuple(divmod(rank, mesh.tp_size) for rank in ranks))
        return comm

    def tolist(self: Tensor) -> Any:
        watch.tally["wait", watch.phase, calling_line()] += 1
        return _nested(stand_in(self), tuple(self.shape))

    yield engine_module, "ControlGroup", LonelyControl
    yield Communicator, "over", classmethod(over)
    yield Communicator, "check_agreement", lambda self, description, what: None
    yield FakeTensor, "tolist", tolist  # its own asks for one number after the other
    # Module.to swaps fake parameters, which their storages' weak references forbid. All is on one device here.
    yield nn.Module, "to", _to
    yield nn.Module, "bfloat16", lambda self: _to(self, torch.bfloat16)
    yield nn.Module, "float", lambda self: _to(self, torch.float32)


def _nested(value: Any, shape: tuple[int, ...]) -> Any:
    return value if not shape else [_nested(value, shape[1:]) for _ in range(shape[0])]


def _to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`Module.to`: new parameters with the old ones' attributes where the dtype changes."""
    _, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    for module in self.modules():
        for name, value in module._parameters.items():
            if value is not None and dtype not in (None, value.dtype):
                moved = nn.Parameter(value.detach().to(dtype), requires_grad=value.requires_grad)
                own = set(moved.__dict__)  # a fake tensor keeps what makes it fake there
                moved.__dict__.update({key: x for key, x in value.__dict__.items() if key not in own})
                module._parameters[name] = moved
    return self
