"""What the ranks of the ZeRO tests do: train a tiny model with awkward shapes, beside the literal reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from optim_reference import ReferenceDeep, ReferenceM3
from torch import Tensor, nn

from hope_megatron.optim import build_optimizer
from hope_megatron.testing.optim_state import export_state, import_state

GLOBAL_BATCH = 24


@dataclass
class OptimSettings:
    """The fields of the configuration that `build_optimizer` reads."""

    name: str = "m3"
    lr: float = 2e-2
    vector_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    slow_beta: float = 0.9
    slow_period_steps: int = 3
    slow_weight: float = 0.5
    denominator_floor: float = 0.1
    stagger: bool = True
    eps: float = 1e-8
    weight_decay: float = 0.1
    form: str = "ema"
    ns_steps: int = 5
    ns_coefficients: str = "quintic"
    ns_dtype: str = "float32"
    momentum: float = 0.95
    nesterov: bool = True
    delta: float = 0.5
    inner_lr: float = 0.5
    inner_decay: float = 0.9
    inner_objective: str = "l2"
    momentum_output: str = "identity"


@dataclass
class Case:
    """One training run: the optimizer, DeepSpeed's settings, and what happens to it."""

    name: str
    stage: int
    optim: OptimSettings = field(default_factory=OptimSettings)
    zero: dict[str, Any] = field(default_factory=dict)
    steps: int = 12
    accumulation: int = 1
    clip: float = 0.0
    dtype: str = "float32"
    fp32_accumulation: bool = False
    changes: tuple[tuple[int, int], ...] = ()
    """Of the slow level's period."""


class TinyModel(nn.Module):
    """Odd shapes, so that matrices straddle ranks: a plain matrix, a stack, fused parts, a slow level, vectors."""

    def __init__(self, changes: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)

        def param(*shape: int, **tags: Any) -> nn.Parameter:
            p = nn.Parameter(torch.randn(*shape) * shape[-1] ** -0.5)
            for key, value in tags.items():
                setattr(p, key, value)
            return p

        self.plain = param(12, 7)
        self.bias = param(12)
        self.table = param(12, 4, optim_role="vector")
        self.stack = param(3, 5, 4)
        self.fused = param(18, 15, optim_fused_parts=(6, 8, 4))
        self.slow = param(6, 18, update_period_steps=2, update_period_changes=changes)
        self.gain = param(1, update_period_steps=2, update_period_changes=changes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.plain.T + self.bias) @ self.table
        hidden = torch.tanh(torch.einsum("bd,hkd->bhk", hidden, self.stack).flatten(1) * 3)
        hidden = torch.tanh(hidden @ self.fused.T * 2) @ self.slow.T
        return ((hidden * (1 + self.gain) - x[:, :6]) ** 2).float().mean()


def batch(step: int) -> Tensor:
    return torch.randn(GLOBAL_BATCH, 7, generator=torch.Generator().manual_seed(1000 + step))


def make_engine(case: Case, model: nn.Module, micro_batch: int, mpu: Any = None) -> Any:
    """A real DeepSpeed engine around the optimizer, bound."""
    import deepspeed
    import deepspeed.ops

    # skips the compilation of a shared-memory collective that only inference uses
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    optimizer = build_optimizer(model.named_parameters(), case.optim)
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clip,
        "zero_optimization": {"stage": case.stage, **case.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if case.dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        config["communication_data_type"] = "fp32"
    if case.dtype == "float16":  # DeepSpeed refuses processors without fast fp16 products; slow ones do for a test
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    if case.fp32_accumulation:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)
    return engine


def train(engine: Any, case: Case, start: int, stop: int) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for step in range(start, stop):
        for part in batch(step).chunk(case.accumulation):
            mine = part.chunk(size)[rank]
            loss = engine(mine.to(getattr(torch, case.dtype)))
            engine.backward(loss)
            engine.step()


def start(case: Case) -> Any:
    """An engine for the tiny model on plain data parallelism, bound."""
    engine = make_engine(case, TinyModel(case.changes), GLOBAL_BATCH // dist.get_world_size() // case.accumulation)
    engine.basic_optimizer.bind_zero(engine.optimizer)
    return engine


def run_case(case: Case) -> dict[str, Any]:
    """Train; the state by parameter name after all steps, and what was logged."""
    engine = start(case)
    train(engine, case, 0, case.steps)
    state, stats = export_state(engine.basic_optimizer), engine.basic_optimizer.last_step_stats(reduce=True)
    engine.destroy()
    return {"state": state, "stats": stats}


def run_cases(rank: int, world_size: int, cases: list[Case]) -> dict[str, Any]:
    return {case.name: run_case(case) for case in cases}


def run_reference(case: Case, world_size: int) -> dict[str, Tensor]:
    """The same training in one process: M3 and the deep optimizers written literally, the others by themselves on whole parameters.

    `world_size` only matters to the rounding in bf16."""
    master = TinyModel(case.changes)
    if case.dtype == "bfloat16":  # DeepSpeed's master weights are copies of the model in bf16
        master.to(torch.bfloat16).float()
    params = dict(master.named_parameters())
    optimizer = build_optimizer(params.items(), case.optim)
    reference = literal(params, optimizer, case)
    for step in range(case.steps):
        _reference_gradients(master, params, step, case, world_size)
        if case.clip:
            torch.nn.utils.clip_grad_norm_(params.values(), case.clip)
        reference.step()
    return {name: p.detach() for name, p in params.items()}


DEEP = ("dgd", "delta_momentum", "dmgd")


def literal(params: dict[str, nn.Parameter], optimizer: Any, case: Case) -> Any:
    """The reference, with the phases of the optimizer's slow clocks; the optimizer itself where none is written down."""
    if case.optim.name not in ("m3", *DEEP):
        return optimizer
    optimizer.bound_vectors()
    phases = dict.fromkeys(params, 0)
    for by_name in optimizer._group_phases.values():
        phases.update(by_name)
    return (ReferenceM3 if case.optim.name == "m3" else ReferenceDeep)(
        params,
        {n: getattr(p, "optim_role", "matrix" if p.ndim >= 2 else "vector") for n, p in params.items()},
        {n: getattr(p, "optim_fused_parts", ()) for n, p in params.items()},
        {n: getattr(p, "update_period_steps", 1) for n, p in params.items()},
        phases,
        {n: case.optim.weight_decay if p.ndim >= 2 else 0.0 for n, p in params.items()},
        case.optim,
        {n: getattr(p, "update_period_changes", ()) for n, p in params.items()},
    )


def _reference_gradients(
    master: nn.Module, params: dict[str, nn.Parameter], step: int, case: Case, world_size: int
) -> None:
    if case.dtype == "float32":
        for p in params.values():
            p.grad = None
        master(batch(step)).backward()
        return
    low = copy.deepcopy(master).to(torch.bfloat16)
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    for part in batch(step).chunk(world_size):
        for p in low.parameters():
            p.grad = None
        low(part.to(torch.bfloat16)).backward()
        for name, p in low.named_parameters():
            total[name] += p.grad.float() / world_size
    for name, p in params.items():
        # DeepSpeed keeps the reduced gradient in bf16, its BF16_Optimizer in fp32
        p.grad = total[name] if case.fp32_accumulation else total[name].bfloat16().float()


def run_resume(rank: int, world_size: int, case: Case, stop_at: int) -> dict[str, Any]:
    """Undisturbed, and saved at `stop_at` and continued in new engines of every stage."""
    engine = start(case)
    train(engine, case, 0, stop_at)
    saved = export_state(engine.basic_optimizer)
    train(engine, case, stop_at, case.steps)
    undisturbed = export_state(engine.basic_optimizer)
    engine.destroy()
    cases = [replace(case, name=f"stage {stage}", stage=stage) for stage in (1, 2, 3)]
    return {"undisturbed": undisturbed, "saved": saved, **run_continue(rank, world_size, saved, cases, stop_at)}


def run_continue(rank: int, world_size: int, saved: dict[str, Any], cases: list[Case], step: int) -> dict[str, Any]:
    """Continue from exported state in a new engine for each case."""
    results = {}
    for case in cases:
        engine = start(case)
        results[case.name] = continue_from(engine, saved, partial(train, engine, case, step, case.steps))
    return results


def continue_from(engine: Any, saved: dict[str, Any], run: Callable[[], None]) -> dict[str, Any]:
    """Import into an engine whose weights were spoilt first, so that whatever is not imported shows."""
    for bound in engine.basic_optimizer.bound_vectors():
        bound.tensor.data.fill_(float("nan"))
    import_state(engine.basic_optimizer, saved)
    run()
    state = export_state(engine.basic_optimizer)
    engine.destroy()
    return state


def run_skipped_steps(rank: int, world_size: int, cases: list[Case]) -> dict[str, Any]:
    """Bad gradients on one rank in the middle of training, NaN and then infinite: state before and after them."""
    results = {}
    for case in cases:
        engine = start(case)
        train(engine, case, 0, 3)
        before = export_state(engine.basic_optimizer)
        for poison in (float("nan"), float("inf")):
            inputs = batch(3).chunk(world_size)[rank].to(getattr(torch, case.dtype))
            engine.backward(engine(inputs) * (poison if rank == 0 else 1.0))
            engine.step()
        results[case.name] = {"before": before, "after": export_state(engine.basic_optimizer)}
        engine.destroy()
    return results
