"""accelerate's Accelerator on two processes trains the exported model as one process does."""

from __future__ import annotations

import pytest
import torch

from hope_megatron.testing.distributed import run_distributed

pytest.importorskip("transformers", reason="the exported modelling code needs transformers")
pytest.importorskip("accelerate", reason="`pip install -e '.[test]'` brings it")

VOCAB = 61


def make_model() -> torch.nn.Module:
    from hope_megatron import HopeConfig, HopeForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, hidden_sizes=(16,))
    return HopeForCausalLM(HopeConfig(**sizes, memory={"chunk_tokens": 8}))


def batches(size: int) -> torch.utils.data.DataLoader:
    data = torch.randint(VOCAB, (8, 16), generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(data, batch_size=size)


def train(rank: int, world_size: int) -> dict:
    import os

    # the environment that `accelerate launch --cpu` makes; the process group is there already
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "ACCELERATE_USE_CPU": "true",
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world_size
    model = make_model()
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), batches(4 // world_size)
    )
    losses = []
    for batch in loader:
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
    weights = accelerator.unwrap_model(model).state_dict()
    return {"losses": losses, "weights": {name: w.numpy() for name, w in weights.items()}}


@pytest.mark.distributed
def test_two_processes_equal_one() -> None:
    two = run_distributed(train, 2, timeout_s=240)
    model, losses = make_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches(4):
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(losses) == 2 and two[0]["losses"] == pytest.approx(losses, abs=1e-5)
    for rank in two:
        for name, expected in model.state_dict().items():
            torch.testing.assert_close(torch.from_numpy(rank["weights"][name]), expected, atol=1e-6, rtol=1e-5)
