"""What the ranks of the tensor-parallel tests do: Megatron layers on TP x DP, beside a reference on full weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from optim_zero_worker import Case, continue_from, literal, make_engine
from torch import Tensor, nn

from hope_megatron.optim import OptimError, ParamTags, build_optimizer, merge_shards, split_shards
from hope_megatron.testing.optim_state import export_layout, export_state, layout_tags

VOCAB, WIDTH, HIDDEN, HEADS = 16, 8, 12, 4
BATCH = 8
FULL_SHAPES = {
    "embedding.weight": (VOCAB, WIDTH),
    "lookup.weight": (VOCAB, WIDTH),
    "gate_up.weight": (2 * HIDDEN, WIDTH),
    "down.weight": (WIDTH, HIDDEN),
    "heads": (HEADS, 3, WIDTH),
    "mixed": (WIDTH, WIDTH),
    "norm": (WIDTH,),
}
TAGS = {
    "embedding.weight": ParamTags(partition_dim=0),
    "lookup.weight": ParamTags(partition_dim=0),
    "gate_up.weight": ParamTags(partition_dim=0, partition_stride=2, fused_parts=(HIDDEN, HIDDEN)),
    "down.weight": ParamTags(partition_dim=1),
    "heads": ParamTags(partition_dim=0),
    "mixed": ParamTags(),
    "norm": ParamTags(),
}


def full_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in FULL_SHAPES.items()}


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(500 + step)
    return torch.randint(VOCAB, (BATCH,), generator=generator), torch.randn(BATCH, WIDTH, generator=generator)


def full_loss(w: dict[str, Tensor], tokens: Tensor, target: Tensor) -> Tensor:
    """The model in plain torch with full weights."""
    x = w["embedding.weight"][tokens] * w["norm"] + w["lookup.weight"][tokens]
    gate, up = (x @ w["gate_up.weight"].T).chunk(2, dim=-1)
    x = x + (torch.tanh(gate) * up) @ w["down.weight"].T
    x = x + torch.einsum("bd,hkd->bhk", x, w["heads"]).tanh().sum((1, 2))[:, None] * w["norm"]
    return (x @ w["mixed"].T - target).square().mean()


def tag_slow(name: str, param: nn.Parameter, changes: tuple[tuple[int, int], ...]) -> None:
    """Where there are changes of a period, a shard of rows, one of columns and a vector are of a slow level of period 2."""
    if changes and name in ("down.weight", "heads", "norm"):
        param.update_period_steps, param.update_period_changes = 2, changes  # type: ignore[attr-defined]


class ParallelModel(nn.Module):
    """The same with Megatron's layers, each rank with its shard of `full_weights`."""

    def __init__(self, tags_hidden: bool = False, changes: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__()
        from megatron.core import ModelParallelConfig, parallel_state
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

        size, rank = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
        )
        config = ModelParallelConfig(
            tensor_model_parallel_size=size,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            perform_initialization=True,
        )
        common = {"config": config, "init_method": nn.init.zeros_, "bias": False, "skip_bias_add": True}
        self.embedding = VocabParallelEmbedding(VOCAB, WIDTH, init_method=nn.init.zeros_, config=config)
        self.lookup = VocabParallelEmbedding(VOCAB, WIDTH, init_method=nn.init.zeros_, config=config)
        self.gate_up = ColumnParallelLinear(WIDTH, 2 * HIDDEN, stride=2, gather_output=False, **common)
        self.down = RowParallelLinear(HIDDEN, WIDTH, input_is_parallel=True, **common)
        self.heads = nn.Parameter(torch.zeros(HEADS // size, 3, WIDTH))
        self.heads.tensor_model_parallel, self.heads.partition_dim = True, 0
        self.mixed = nn.Parameter(torch.zeros(WIDTH, WIDTH))
        self.norm = nn.Parameter(torch.ones(WIDTH))
        self.embedding.weight.optim_role = "vector"
        self.gate_up.weight.optim_fused_parts = (HIDDEN, HIDDEN)
        full = full_weights()
        for name, param in self.named_parameters():
            param.data.copy_(split_shards(full[name], TAGS[name], size)[rank])
            tag_slow(name, param, changes)
            if tags_hidden:  # the control: every shard passes for a matrix
                param.tensor_model_parallel, param.optim_fused_parts = False, ()

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import (
            copy_to_tensor_model_parallel_region,
            reduce_from_tensor_model_parallel_region,
        )

        x = self.embedding(tokens) * self.norm + self.lookup(tokens)
        gate, up = self.gate_up(x)[0].chunk(2, dim=-1)
        x = x + self.down(torch.tanh(gate) * up)[0]
        heads = torch.einsum("bd,hkd->bhk", copy_to_tensor_model_parallel_region(x), self.heads).tanh().sum((1, 2))
        x = x + reduce_from_tensor_model_parallel_region(heads)[:, None] * self.norm
        return (x @ self.mixed.T - target).square().mean()


def _start_megatron(tp_size: int) -> Any:
    from megatron.core import parallel_state

    from hope_megatron.engine.mpu import ModelParallelUnit
    from hope_megatron.parallel.distributed import install_cpu_support

    install_cpu_support()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp_size, create_gloo_process_groups=False)
    return ModelParallelUnit()


def bind(engine: Any) -> None:
    from megatron.core import parallel_state

    engine.basic_optimizer.bind_zero(
        engine.optimizer,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        exchange_group=parallel_state.get_tensor_and_data_parallel_group(),
    )


def train(engine: Any, case: Case, start: int, stop: int) -> None:
    from megatron.core import parallel_state

    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for step in range(start, stop):
        for tokens, target in zip(*(part.chunk(case.accumulation) for part in batch(step))):
            engine.backward(engine(tokens.chunk(size)[rank], target.chunk(size)[rank]))
            engine.step()


def run_tp_cases(rank: int, world_size: int, cases: list[Case], control: Case) -> dict[str, Any]:
    """Every case, the control with hidden tags, and each case continued from the state of the first at step 7."""
    from megatron.core import parallel_state

    mpu = _start_megatron(2)
    results: dict[str, Any] = {"tp_rank": parallel_state.get_tensor_model_parallel_rank()}
    results["plain"] = _without_zero(cases[0])
    results["errors"] = _wrong_bindings(cases[0], mpu)
    for case in [*cases, control]:
        micro_batch = BATCH // (world_size // 2) // case.accumulation
        engine = make_engine(case, ParallelModel(case is control, case.changes), micro_batch, mpu)
        bind(engine)
        train(engine, case, 0, 7)
        saved = export_state(engine.basic_optimizer)
        train(engine, case, 7, case.steps)
        results[case.name] = {
            "saved": saved,
            "state": export_state(engine.basic_optimizer),
            "layout": export_layout(engine.basic_optimizer),
            "stats": engine.basic_optimizer.last_step_stats(reduce=True),
        }
        engine.destroy()
    return results


def _without_zero(case: Case) -> dict[str, Any]:
    """No DeepSpeed: every data-parallel replica sees the whole batch, matrices are gathered over tensor parallelism."""
    from megatron.core import parallel_state

    model = ParallelModel()
    optimizer = build_optimizer(model.named_parameters(), case.optim)
    optimizer.bind_plain(parallel_state.get_tensor_model_parallel_group())
    for step in range(case.steps):
        optimizer.zero_grad()
        model(*batch(step)).backward()
        optimizer.step()
    return {"state": export_state(optimizer)}


def _wrong_bindings(case: Case, mpu: Any) -> list[str]:
    """Forgotten and incomplete bindings, each of which would treat a shard as a matrix: the messages."""
    from megatron.core import parallel_state

    tp_group = parallel_state.get_tensor_model_parallel_group()
    model = ParallelModel()
    plain = build_optimizer(model.named_parameters(), case.optim)
    model(*batch(0)).backward()
    engine = make_engine(case, ParallelModel(), BATCH // 2, mpu)
    zero, messages = engine.basic_optimizer, []
    for action in (
        plain.step,
        lambda: train(engine, case, 0, 1),
        lambda: zero.bind_zero(engine.optimizer),
        lambda: zero.bind_zero(engine.optimizer, tp_group=tp_group),
        lambda: plain.bind_zero(engine.optimizer, tp_group=tp_group),
        lambda: zero.bind_zero(object()),
    ):
        try:
            action()
            messages.append("no error")
        except OptimError as error:
            messages.append(f"{type(error).__name__}: {error}")
    engine.destroy()
    return messages


def continue_tp(
    rank: int, world_size: int, full_state: dict[str, dict[str, Any]], tp_size: int, cases: list[Case], start: int
) -> Any:
    """Continue from merged (full) state on another TP size; the full state afterwards is merged by the caller."""
    from megatron.core import parallel_state

    mpu = _start_megatron(tp_size)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    results: dict[str, Any] = {"tp_rank": tp_rank}
    for case in cases:
        state = {
            name: {
                key: split_shards(value, TAGS[name], tp_size)[tp_rank] if isinstance(value, Tensor) else value
                for key, value in entry.items()
            }
            for name, entry in full_state.items()
        }
        engine = make_engine(case, ParallelModel(), BATCH // (world_size // tp_size), mpu)
        bind(engine)
        results[case.name] = continue_from(engine, state, partial(train, engine, case, start, case.steps))
    return results


def merge_ranks(results: list[dict[str, Any]], case: str, key: str) -> dict[str, dict[str, Any]]:
    """Full state from the exports of the ranks of data-parallel rank 0."""
    by_tp = {result["tp_rank"]: result[case] if key == "" else result[case][key] for result in reversed(results)}
    shards = [by_tp[tp] for tp in sorted(by_tp)]
    return {
        name: {
            k: merge_shards([shard[name][k] for shard in shards], TAGS[name]) if isinstance(v, Tensor) else v
            for k, v in entry.items()
        }
        for name, entry in shards[0].items()
    }


def run_reference(case: Case) -> dict[str, Tensor]:
    """The same training on full weights in one process: M3 and the deep optimizers written literally, the others by themselves."""
    params = {name: nn.Parameter(value) for name, value in full_weights().items()}
    for n, p in params.items():
        p.optim_role = "vector" if n in ("embedding.weight", "norm") else "matrix"
        p.optim_fused_parts = TAGS[n].fused_parts
        tag_slow(n, p, case.changes)
    optimizer = build_optimizer(params.items(), case.optim)
    reference = literal(params, optimizer, case)
    for step in range(case.steps):
        for p in params.values():
            p.grad = None
        full_loss(params, *batch(step)).backward()
        if case.clip:
            torch.nn.utils.clip_grad_norm_(params.values(), case.clip)
        reference.step()
    return {n: p.detach() for n, p in params.items()}


def tags_from_layout(result: dict[str, Any], case: str) -> dict[str, ParamTags]:
    return {name: layout_tags(entry) for name, entry in result[case]["layout"].items()}
