"""M3 and its peers under FSDP2 and DDP on two processes compute what one process computes, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hope_megatron.testing.distributed import run_distributed

STEPS, BEFORE = 5, 3


def model_and_batches() -> tuple[nn.Module, torch.Tensor]:
    from hope_megatron import HopeBlock

    torch.manual_seed(0)
    # 5 rows do not divide by 2; a bias of one row leaves rank 1 without any
    layers = nn.Sequential(
        nn.Linear(6, 16), HopeBlock(16, 2, hidden_sizes=(12,)), _First(), nn.Linear(16, 5), nn.Linear(5, 1)
    )
    batches = torch.randn(STEPS, 4, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return layers.double(), batches


class _First(nn.Module):
    def forward(self, pair):
        return pair[0]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: torch.Tensor) -> None:
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def kinds():
    from hope_megatron.optim import DGD, M3, AdaMuon, Muon

    settings = {"lr": 1e-2, "vector_lr": 5e-3}
    return {
        "m3": lambda model: M3(model, slow_period_steps=2, **settings),
        "muon": lambda model: Muon(model, **settings),
        "adamuon": lambda model: AdaMuon(model, **settings),
        "dgd": lambda model: DGD(model, **settings),
    }


def fully_sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer)
    return fully_shard(model)


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer))), checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.load(parts, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])


def sharded(rank: int, world_size: int, folder: Path) -> dict:
    from torch.nn.parallel import DistributedDataParallel

    found = {}
    for name, make in kinds().items():
        for wrapper in ("fsdp", "ddp"):
            model, batches = model_and_batches()
            trained = fully_sharded(model) if wrapper == "fsdp" else DistributedDataParallel(model)
            own = batches[:, rank::world_size]
            first, optimizer = make(model), make(model)
            train(trained, first, own[:BEFORE])
            if wrapper == "fsdp":
                save(model, first, folder / name)
                model = trained = fully_sharded(model_and_batches()[0])
                optimizer = make(model)
                load(model, optimizer, folder / name)
            else:
                optimizer.load_state_dict(first.state_dict())
            train(trained, optimizer, own[BEFORE:])
            weights = {key: p.full_tensor() if wrapper == "fsdp" else p for key, p in model.named_parameters()}
            stats = optimizer.last_step_stats()
            found[f"{name}/{wrapper}"] = (
                {key: value.detach().numpy() for key, value in weights.items()},
                stats["optim/newton_schulz_calls"],
            )
    return found


@pytest.mark.distributed
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """Also where `torch.distributed.checkpoint` was in between, and where what two ranks saved goes on in one process."""
    results = run_distributed(sharded, 2, tmp_path)
    for name, make in kinds().items():
        model, batches = model_and_batches()
        optimizer = make(model)
        train(model, optimizer, batches)
        alone = optimizer.last_step_stats()["optim/newton_schulz_calls"]
        resumed, _ = model_and_batches()
        load(resumed, optimizer_there := make(resumed), tmp_path / name)
        train(resumed, optimizer_there, batches[BEFORE:])
        found = [rank[f"{name}/{wrapper}"][0] for wrapper in ("fsdp", "ddp") for rank in results]
        found.append({key: p.detach().numpy() for key, p in resumed.named_parameters()})
        for weights in found:
            for key, expected in model.named_parameters():
                torch.testing.assert_close(torch.from_numpy(weights[key]), expected.detach(), atol=1e-10, rtol=0)
        calls = [rank[f"{name}/fsdp"][1] for rank in results]
        assert sum(calls) == alone and (min(calls) > 0 or name == "dgd"), (
            "no matrix is orthogonalised twice, and both ranks work"
        )
