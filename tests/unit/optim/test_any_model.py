"""The optimizers on models that know nothing of this project."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hope_megatron import HopeBlock
from hope_megatron.optim import M3, AdamW, Muon, OptimError
from hope_megatron.rehearse.memory import MemoryLog


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.lm_head = nn.Linear(16, 20, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.wte(tokens).mT).mT
        return self.lm_head(self.up(self.norm(self.attention(x, x, x, need_weights=False)[0])))


def small() -> Small:
    torch.manual_seed(0)
    return Small()


def loss_of(model: nn.Module, step: int = 0) -> torch.Tensor:
    tokens = torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), (tokens.flatten() + 1) % 20)


def matrices(optimizer: torch.optim.Optimizer, model: nn.Module) -> set[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for group in optimizer.param_groups if group["role"] == "matrix" for p in group["params"]}


def test_a_module_is_sorted_by_class_and_name_and_shape() -> None:
    model = small()
    wanted = {"attention.in_proj_weight", "attention.out_proj.weight", "up.weight"}
    assert matrices(M3(model), model) == wanted
    assert model.attention.in_proj_weight.optim_fused_parts == (8, 8, 8)
    assert matrices(M3(small_names := list(model.named_parameters())), model) == wanted and small_names
    # without names, shapes are all there is: lm_head and wte look like any matrix
    assert matrices(M3(model.parameters()), model) == {*wanted, "lm_head.weight", "wte.weight"}
    assert matrices(M3(model), model) == wanted, "what an earlier optimizer guessed is forgotten"
    wide = nn.Linear(8, 1000)
    assert matrices(M3(wide.parameters()), wide) == set(), "sides of 8 and 1000: a vocabulary"


def test_hope_layers_say_themselves_what_they_are() -> None:
    block = HopeBlock(16, 2, hidden_sizes=(8, 8), update_periods=(1, 3))
    groups = {group["name"]: group for group in M3(block).param_groups}
    names = {id(p): name for name, p in block.named_parameters()}
    assert groups["matrix/period_3"]["update_period_steps"] == 3
    assert "mixer.memories.mem_out" in {names[id(p)] for p in groups["matrix/no_decay"]["params"]}
    assert {"mixer.rates.weight", "mixer.conv"} <= {names[id(p)] for p in groups["vector"]["params"]}
    assert block.mixer.qkv.weight.optim_fused_parts == (16, 16, 16)


def test_groups_override() -> None:
    model = small()
    optimizer = Muon(
        [
            {"params": model.up.parameters(), "lr": 0.5, "weight_decay": 0.0},
            {"params": [model.lm_head.weight], "role": "vector", "name": "head"},
        ],
        lr=1e-2,
        vector_lr=1e-3,
    )
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert found == {"group_0/matrix": (0.5, 0.0), "group_0/vector/no_decay": (0.5, 0.0), "head/vector": (1e-3, 0.1)}
    optimizer.add_param_group({"params": list(model.norm.parameters()), "lr": 0.25})
    assert optimizer.param_groups[-1]["lr"] == 0.25 and optimizer.param_groups[-1]["role"] == "vector"
    with pytest.raises(OptimError, match="takes a module, parameters, named parameters or groups"):
        M3([1, 2])
    with pytest.raises(OptimError, match="got no parameters"):
        M3([])


@pytest.mark.parametrize("kind", [M3, Muon, AdamW])
def test_schedules_and_a_saved_state_go_on_alike(kind: type) -> None:
    def train(steps: range, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: object) -> None:
        for step in steps:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
            schedule.step()  # type: ignore[attr-defined]

    def made() -> tuple:
        model = small()
        optimizer = kind(model, lr=2e-2)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)

    whole = made()
    train(range(6), *whole)
    first = made()
    train(range(3), *first)
    saved = copy.deepcopy([part.state_dict() for part in first])
    second = made()
    for part, state in zip(second, saved):
        part.load_state_dict(state)
    train(range(3, 6), *second)
    for mine, theirs in zip(second[0].parameters(), whole[0].parameters()):
        torch.testing.assert_close(mine, theirs, atol=0, rtol=0)


def test_gradient_scaler_skips_what_is_not_finite() -> None:
    model = small()
    optimizer, scaler = M3(model, lr=1e-2), torch.amp.GradScaler("cpu", init_scale=4.0)
    plain = small()
    reference = M3(plain, lr=1e-2)
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)
    scaler.update()
    loss_of(plain).backward()
    reference.step()
    torch.testing.assert_close(model.up.weight, plain.up.weight, atol=1e-7, rtol=0)
    model.up.weight.grad.fill_(float("inf"))
    before = model.up.weight.clone()
    scaler.step(optimizer)
    assert torch.equal(before, model.up.weight)


def test_memory_layout_does_not_matter() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    assert not last.weight.is_contiguous()
    for model in (plain, last):
        optimizer = M3(model, lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(1, 4, 5, 5)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(last.weight, plain.weight, atol=1e-6, rtol=0)


def test_what_cannot_be_stepped_is_refused() -> None:
    half = nn.Linear(4, 4).bfloat16()
    half(torch.ones(1, 4).bfloat16()).sum().backward()
    with pytest.raises(OptimError, match="bfloat16 parameters; step float32 master weights"):
        M3(half).step()
    table = nn.Embedding(5, 4, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with warnings.catch_warnings(), pytest.raises(OptimError, match="sparse=False"):
        M3(table).step()


class Allocations(TorchDispatchMode):
    """Notes every storage that is made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.log = MemoryLog(rounded=False)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def storages(tree: object) -> dict[int, torch.Tensor]:
            return {x.untyped_storage()._cdata: x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}

        before, result = storages((args, kwargs)), func(*args, **(kwargs or {}))
        self.log.time += 1
        for key, x in storages(result).items():
            if key not in before:  # a tensor that is written in place was there
                self.log.see(x, "")
        return result


@pytest.mark.parametrize("kind", [M3, Muon, AdamW])
def test_a_step_holds_temporaries_of_one_parameter_only(kind: type) -> None:
    """torch's `foreach` implementations hold those of all parameters at once."""

    def peak(num_layers: int, make: Callable[[nn.Module], torch.optim.Optimizer]) -> int:
        model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(num_layers)])
        optimizer = make(model)
        for _ in range(2):  # state is made at the first step
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            with Allocations() as step:
                optimizer.step()
        return step.log.peak_bytes() // (64 * 64 * 4)

    assert peak(2, kind) == peak(8, kind) <= 12
    assert peak(8, lambda model: torch.optim.AdamW(model.parameters(), foreach=True)) >= 8


def test_a_compiled_step_makes_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    plain, compiled = small(), small()

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()

    with torch._dynamo.config.patch(disable=False):
        torch._dynamo.reset()
        fast = torch.compile(train, backend="eager")
        for model, run in ((plain, train), (compiled, fast)):
            optimizer = M3(model, lr=1e-2)
            for step in range(3):
                run(model, optimizer, step)
    for mine, theirs in zip(compiled.parameters(), plain.parameters()):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)
