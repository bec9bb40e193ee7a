"""What all optimizers here share: binding to a layout, the update clock, AdamW for vectors, statistics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hope_megatron.config.clock import UpdateClock, update_clock
from hope_megatron.config.matrices.plan import ParamLayout, assign_phases, param_flops
from hope_megatron.config.matrices.runs import Run
from hope_megatron.optim.average import EMA, update_average
from hope_megatron.optim.bound import BoundVector
from hope_megatron.optim.dtensors import local_tensor, row_shard
from hope_megatron.optim.errors import OptimError, UnboundShardError
from hope_megatron.optim.exchange import Communicator, MatrixExchange, NewtonSchulz
from hope_megatron.optim.sorting import sorted_groups
from hope_megatron.optim.statistics import last_step_stats, relative_updates
from hope_megatron.optim.tags import read_tags
from hope_megatron.optim.update import UpdateContext, adam_update
from hope_megatron.optim.zero import FlatVector, check_wrapper, flat_vectors, shard_shape


class SharedSettings(TypedDict, total=False):
    """What every optimizer takes besides its own settings: `M3(model, lr=2e-2, weight_decay=0.0)`.

    vector_lr: learning rate of embeddings, norms, convolutions and biases; None means lr. weight_decay: decoupled, of matrices and
    embeddings (0.1). betas, eps: decay of the moments ((0.9, 0.95)), and what is added to the root of the second (1e-8).
    ns: how matrices are orthogonalised, where they are.
    """

    vector_lr: float | None
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    ns: NewtonSchulz | None


class BoundOptimizer(torch.optim.Optimizer):
    """Base class. State tensors have the shape of the tensor that is stepped: ZeRO and FSDP2 shard them as they do Adam's.

    It takes what `sorting.sorted_groups` takes: a module, named parameters, parameters, or groups. Under ZeRO call `bind_zero`
    once after `deepspeed.initialize`. Without ZeRO whole parameters and FSDP2's DTensors need nothing; Megatron-Core's
    tensor-parallel shards need `bind_plain`.

    Update clock (Nested Learning, arXiv 2512.24695, eq. 71): a group with `update_period_steps` n > 1 adds up its
    gradients over n calls of `step` and makes one update with their **sum** at the end, at that step's learning rate;
    parameters, moments and weight decay stand still meanwhile. AdamW, Muon, AdaMuon and M3's ema form do not depend on
    the scale of the gradient: for them a sum is as good as a mean, and the group moves once as far as others do in one
    step. SGD's update is as large as the gradient: n steps' worth, and its weight decay counts n times to match. M3's
    paper form divides by sqrt(V): its update is n times smaller than a mean's. `state["step"]` counts calls; the period and the
    number of an update are functions of it alone (`config/clock.py`), and of `update_period_changes` where the period changes.
    A step that DeepSpeed skips (overflow) never calls `step` and changes nothing.
    """

    orthogonalizes = False
    """Whether matrices go through Newton-Schulz."""
    whole_matrices = False
    """Whether updates need whole matrices for something else."""
    matrix_state: tuple[str, ...] = ()
    vector_state: tuple[str, ...] = ("m1", "v")
    grows_with_gradient = False
    """Whether the update is proportional to the gradient: a period's sum is then n steps' worth, weight decay too."""
    measure_updates = False
    """Set before a step: it then notes what `relative_updates` tells."""
    ema_decay = 0.0
    """Decay per step of an exponential average of the weights, the state tensor `ema`; 0 keeps none. Set before the first step."""

    def __init__(
        self,
        params: Any,
        lr: float = 2e-3,
        *,
        vector_lr: float | None = None,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        ns: NewtonSchulz | None = None,
        own: Mapping[str, Any] | None = None,
    ) -> None:
        """own: what else `UpdateContext.group` holds for `matrix_update`, under the names of the optimizer's own settings."""
        if not lr >= 0:
            raise OptimError(f"lr is {lr}; it must be 0 or more")
        self._settings: dict[str, Any] = {"lr": lr, "vector_lr": vector_lr, "weight_decay": weight_decay}
        self._names: dict[str, list[str]] = {}
        self.ns = ns or NewtonSchulz()
        self._bound: dict[int, BoundVector] = {}
        self._comms: dict[int, Communicator] = {}
        self._loads: dict[int, list[int]] = {}
        self._plain_comm: Communicator | None = None
        self.zero_wrapper: Any = None
        super().__init__(sorted_groups(params, **self._settings), {"betas": betas, "eps": eps, **(own or {})})
        self._group_phases: dict[str, dict[str, int]] = {}
        # torch.compile leaves it as it is: traced, a step would be compiled anew for every number of updates
        self._step_parameters = torch.compiler.disable(self._step_all)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; parameters are sorted into matrices and vectors."""
        if "role" not in param_group or "name" not in param_group:
            number = len(self.param_groups)
            for group in sorted_groups([{"name": f"group_{number}", **param_group}], **self._settings):
                self.add_param_group(group)
            return
        if param_group["name"] in self._names:
            raise OptimError(f"two parameter groups have the name {param_group['name']!r}; give them different ones")
        super().add_param_group(param_group)
        self._names[param_group["name"]] = [getattr(p, "optim_name", "?") for p in param_group["params"]]

    # -- binding -------------------------------------------------------------------------------------------------------

    def bind_zero(self, zero_wrapper: Any, *, tp_group: Any = None, exchange_group: Any = None) -> None:
        """Learn from DeepSpeed's wrapper (`engine.optimizer`) where parameters lie in the flat vectors. Collective.

        tp_group: the tensor-parallel group, None without tensor parallelism. exchange_group: the group of all ranks
        that hold parts of this rank's parameters, data parallel x tensor parallel (Megatron:
        `get_tensor_and_data_parallel_group`); it may be None without tensor parallelism. Call it again after anything
        that rebuilds the wrapper.
        """
        tp_size = dist.get_world_size(tp_group) if tp_group is not None else 1
        tp_rank = dist.get_rank(tp_group) if tp_size > 1 else 0
        check_wrapper(zero_wrapper, self, tp_size)
        if tp_size > 1 and exchange_group is None:
            raise OptimError(
                "bind_zero needs exchange_group, the data-parallel x tensor-parallel group, when tp_group is given"
            )
        vectors = flat_vectors(zero_wrapper)
        self._bound.clear()
        layouts = [self._vector_layout(vector) for vector in vectors]
        by_group: dict[int, list[ParamLayout]] = {}
        for vector, layout in zip(vectors, layouts):
            by_group.setdefault(vector.group_index, []).extend(layout)
        self._group_phases = {
            self.param_groups[index]["name"]: self._slow_phases(self.param_groups[index], params, tp_size)
            for index, params in by_group.items()
        }
        comms: dict[int, Communicator] = {}
        for vector, layout in zip(vectors, layouts):
            group = exchange_group if tp_size > 1 else vector.dp_group
            dp_rank = dist.get_rank(vector.dp_group)
            if id(group) not in comms:
                comms[id(group)] = Communicator.over(group, dp_rank, tp_rank)
            self._bind(
                vector.tensor, self.param_groups[vector.group_index], layout, comms[id(group)], vector.dp_group, dp_rank
            )
        self.zero_wrapper = zero_wrapper

    def bind_plain(self, tp_group: Any = None) -> None:
        """Without ZeRO: gather tensor-parallel shards over `tp_group`; all data-parallel replicas do the same work."""
        self._bound.clear()
        self._plain_comm = Communicator.over(tp_group, 0, dist.get_rank(tp_group) if tp_group is not None else 0)
        self._group_phases.clear()

    def _vector_layout(self, vector: FlatVector) -> list[ParamLayout]:
        return [self._param_layout(param, runs) for param, runs in vector.params]

    @staticmethod
    def _param_layout(param: nn.Parameter, runs: tuple[Run, ...]) -> ParamLayout:
        name = getattr(param, "optim_name", None)
        if name is None:
            raise OptimError(
                "a parameter has no optim_name; build the groups with hope_megatron.optim.build_param_groups"
            )
        shape = shard_shape(param)
        return ParamLayout(name, shape, read_tags(param, name, shape), runs)

    def _bind(
        self,
        tensor: Tensor,
        group: dict[str, Any],
        params: list[ParamLayout],
        comm: Communicator,
        dp_group: Any,
        dp_rank: int,
        loads: list[int] | None = None,
    ) -> BoundVector:
        exchange = None
        if (self.orthogonalizes or self.whole_matrices) and group["role"] == "matrix":
            phases = self._group_phases[group["name"]]
            loads = self._loads.setdefault(
                id(comm), [0] * comm.topology.size
            )  # of vectors bound before: spread the work
            exchange = MatrixExchange(params, comm, self.ns, [phases[param.name] for param in params], loads)
        bound = BoundVector(tensor, group["name"], params, dp_group, dp_rank, exchange)
        self._bound[id(tensor)] = bound
        return bound

    def _bound_vector(self, tensor: Tensor, group: dict[str, Any]) -> BoundVector:
        bound = self._bound.get(id(tensor))
        if bound is None:
            bound = self._bind_whole(tensor, group)
        return bound

    def _bind_whole(self, tensor: Tensor, group: dict[str, Any]) -> BoundVector:
        """Bind a plain parameter; anything else was put here by a wrapper and has an unknown layout."""
        if getattr(tensor, "optim_name", None) is None:
            raise UnboundShardError(
                f"parameter group {group['name']!r} ({_some_of(self._names[group['name']])}) holds a flat vector of "
                f"{tensor.numel()} elements with an unknown layout; call optimizer.bind_zero(engine.optimizer) after "
                "deepspeed.initialize"
            )
        layouts = {id(p): self._param_layout(p, (Run(0, 0, 0, p.numel()),)) for p in group["params"]}
        layout, comm = layouts[id(tensor)], self._plain_comm
        shard = row_shard(tensor, layout.name)
        if shard is not None:
            comm = self._comm_over(shard.group, shard.rank)
            self._set_phases(group, list(layouts.values()), 1)
            loads = self._loads.setdefault(
                id(comm), [0] * comm.topology.size
            )  # of parameters bound before: spread the work
            layout = replace(layout, runs=shard.runs)
            return self._bind(tensor, group, [layout], comm, shard.group, shard.rank, loads)
        if comm is None:
            distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
            if layout.tags.partition_dim is not None and distributed:
                raise UnboundShardError(
                    f"{layout.name} is a tensor-parallel shard; call optimizer.bind_zero, or without ZeRO "
                    "optimizer.bind_plain(tp_group)"
                )
            comm = Communicator()
        self._set_phases(group, list(layouts.values()), comm.topology.tp_size)
        return self._bind(tensor, group, [layout], comm, None, 0)

    def _comm_over(self, group: Any, rank: int) -> Communicator:
        if id(group) not in self._comms:
            self._comms[id(group)] = Communicator.over(group, rank, 0)
        return self._comms[id(group)]

    def _set_phases(self, group: dict[str, Any], layouts: list[ParamLayout], tp_size: int) -> None:
        if group["name"] not in self._group_phases:
            self._group_phases[group["name"]] = self._slow_phases(group, layouts, tp_size)

    def _slow_phases(self, group: dict[str, Any], params: list[ParamLayout], tp_size: int) -> dict[str, int]:
        """Offset of the slow clock by parameter name."""
        period = self.slow_period(group)
        if group["role"] != "matrix" or period == 1:
            return {param.name: 0 for param in params}
        return assign_phases({param.name: param_flops(param, tp_size, self.ns.steps) for param in params}, period)

    def slow_period(self, group: dict[str, Any]) -> int:
        """Number of different phases of the slow clock; 1 where there is none."""
        return 1

    def bound_vectors(self) -> list[BoundVector]:
        """All vectors, in group order; binds plain parameters that have not been stepped yet."""
        if self.zero_wrapper is None:
            for group in self.param_groups:
                for param in group["params"]:
                    self._bound_vector(param, group)
        return list(self._bound.values())

    # -- the step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One optimizer step over the parameters that have a gradient. ZeRO calls it once per group or sub-group."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_parameters()
        return loss

    def _step_all(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_vector(param, group)

    def _step_vector(self, param: Tensor, group: dict[str, Any]) -> None:
        bound = self._bound_vector(param, group)
        if bound.exchange is not None:
            bound.exchange.begin_step()
        if param.dtype not in (torch.float32, torch.float64):
            raise OptimError(
                f"group {group['name']!r} has {param.dtype} parameters; step float32 master weights (ZeRO keeps them), and train "
                "in a lower precision with torch.autocast or FSDP2's MixedPrecisionPolicy"
            )
        gradient = local_tensor(param.grad)
        if gradient.is_sparse:
            raise OptimError(f"group {group['name']!r} has sparse gradients; make the embedding with sparse=False")
        local = local_tensor(param)
        kept, flat = self.state[param], local.reshape(-1)  # a copy where the tensor is not contiguous
        if not kept:
            self.init_state(kept, param, group)
        kept["step"] += 1
        state = {key: local_tensor(x).view(-1) if isinstance(x, Tensor) else x for key, x in kept.items()}
        clock, number = group_clock(group), state["step"]
        grad = self._due_gradient(gradient.reshape(-1), state, clock)
        if grad is None:
            bound.update_norm = None  # no update in this step: nothing to report
            bound.changes.clear()
        else:
            if group.get("adaptive_level") and group["role"] == "matrix":
                momentum = state["m1"]
                bound.agreement = torch.stack([grad.dot(momentum), grad.dot(grad), momentum.dot(momentum)])
            at = clock.updates(number), bound.exchange, flat, clock.period(number)
            self._update(bound, flat, UpdateContext(grad, state, group, *at))
        if self.ema_decay:
            update_average(state[EMA], flat, self.ema_decay, state["step"])
        if not local.is_contiguous():
            local.copy_(flat.view_as(local))

    def _update(self, bound: BoundVector, flat: Tensor, context: UpdateContext) -> None:
        group = context.group
        if group["weight_decay"]:
            steps = context.period if self.grows_with_gradient else 1
            flat.mul_(1.0 - group["lr"] * group["weight_decay"] * steps)
        update = self.matrix_update(context) if group["role"] == "matrix" else self.vector_update(context)
        flat.add_(update, alpha=-group["lr"])
        bound.update_norm = torch.linalg.vector_norm(update)
        if self.measure_updates:
            bound.measure(update, group["lr"])

    def state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the state tensors of a group, all of the shape of what is stepped."""
        keys = self.matrix_state if group["role"] == "matrix" else self.vector_state
        return keys + (("pending_grad",) if _gathers(group) else ()) + ((EMA,) if self.ema_decay else ())

    def init_state(self, state: dict[str, Any], stepped: Tensor, group: dict[str, Any]) -> None:
        """All state at once, at the first step: DeepSpeed links the tensors it finds then.

        stepped: a flat vector, or a parameter: a DTensor gets DTensors, which `torch.distributed.checkpoint` can shard anew.
        """
        state["step"] = 0
        for key in self.state_keys(group):
            state[key] = torch.zeros_like(stepped, memory_format=torch.contiguous_format)

    @staticmethod
    def _due_gradient(grad: Tensor, state: dict[str, Any], clock: UpdateClock) -> Tensor | None:
        if clock.period(state["step"]) == 1:
            return grad
        pending = state["pending_grad"].add_(grad)
        if not clock.due(state["step"]):
            return None
        total = pending.clone()
        pending.zero_()
        return total

    @abstractmethod
    def matrix_update(self, context: UpdateContext) -> Tensor:
        """The update of a vector of matrices, before learning rate and sign."""

    def vector_update(self, context: UpdateContext) -> Tensor:
        """The same for a vector of everything else."""
        return adam_update(context)

    # -- statistics ----------------------------------------------------------------------------------------------------

    def last_step_stats(self, *, reduce: bool = False) -> dict[str, float]:
        """See `statistics.last_step_stats`."""
        return last_step_stats(list(self._bound.values()), reduce=reduce)

    def relative_updates(self, label: Callable[[str], str | None]) -> dict[str, float]:
        """See `statistics.relative_updates`; of the last step, if it was to `measure_updates`."""
        return relative_updates(list(self._bound.values()), label)


def _gathers(group: Mapping[str, Any]) -> bool:
    return group_clock(group).longest > 1 or bool(group.get("adaptive_level"))


def group_clock(group: Mapping[str, Any]) -> UpdateClock:
    """When the parameters of a group are updated."""
    changes = group.get("update_period_changes", ())
    return update_clock(group["update_period_steps"], tuple((step, period) for step, period in changes))


def _some_of(names: list[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
