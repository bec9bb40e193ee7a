"""The model on one process: streaming, parameter counts, initial weights."""

from __future__ import annotations

import itertools

import pytest
import torch

from hope_megatron.config import load_model_config
from hope_megatron.config.model import AttentionConfig, MemoryConfig
from hope_megatron.model import ModelState, build_model, offload
from hope_megatron.model.loss import IGNORE
from hope_megatron.testing.models import random_batch, tiny_model

pytestmark = pytest.mark.usefixtures("world_of_one")


CASES = {
    "hope": tiny_model(memory=MemoryConfig(chunk_tokens=8, self_chunk_tokens=16, momentum="data")),
    "hope_output": tiny_model(memory=MemoryConfig(chunk_tokens=8, written_layers="output")),
    "transformer": tiny_model(layer_pattern=("attention",)),
    "window": tiny_model(layer_pattern=("attention", "memory"), attention=AttentionConfig(window_tokens=5)),
}


ARMT = tiny_model(
    layer_pattern=("attention",), attention=AttentionConfig(num_kv_heads=2, segment_tokens=7, memory_tokens=2)
)


def written(model):
    """Its associative memories, which begin with values of 0, write something."""
    for name, parameter in model.named_parameters():
        if "associative.value" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("case", [*CASES, "armt"])
def test_stream_in_pieces_equals_one_piece(case):
    """Also token by token, and through a saved and restored state."""
    config = CASES.get(case, ARMT)
    model = written(build_model(config))
    tokens, _ = random_batch(config, seq_length=40)
    with torch.no_grad():
        whole = model(tokens).logits
        state, parts = None, []
        for piece in tokens.split([16, 1, 1, 5, 17], 1):
            output = model(piece, state=state, return_state=True)
            state = ModelState.from_tensors(output.state.tensors(), like=model.init_state(tokens.size(0)))
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_documents_of_a_sample_are_read_as_if_apart(case):
    model = build_model(CASES[case])
    tokens, _ = random_batch(CASES[case], seq_length=40)
    cuts = ([0, 13, 14, 33, 40], [0, 1, 40])
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(c) - 1), torch.tensor(c).diff()) for c in cuts])
    with torch.no_grad():
        packed = model(tokens[:2], documents=documents).logits
        for row, ends in enumerate(cuts):
            for a, b in itertools.pairwise(ends):
                alone = model(tokens[row : row + 1, a:b]).logits
                torch.testing.assert_close(packed[row : row + 1, a:b], alone, rtol=1e-4, atol=1e-5)


def test_later_segments_hear_the_first_through_the_memory_alone():
    model = written(build_model(ARMT))
    tokens, _ = random_batch(ARMT, seq_length=20)
    other = tokens.clone()
    other[:, 3] = (other[:, 3] + 1) % 61
    with torch.no_grad():
        changed = (model(tokens).logits - model(other).logits).abs().amax((0, 2))
        assert changed[:3].max() == 0 and changed[3:].min() > 0
        for layer in model.layers:
            layer.associative.value.weight.zero_()
        changed = (model(tokens).logits - model(other).logits).abs().amax((0, 2))
        assert changed[3:7].min() > 0 and changed[7:].max() == 0


def test_documents_leave_no_state():
    model = build_model(CASES["hope"])
    tokens, _ = random_batch(CASES["hope"])
    with pytest.raises(ValueError, match="no state"):
        model(tokens, documents=torch.zeros_like(tokens), return_state=True)


def test_losses_are_cross_entropies_over_the_unpadded_vocabulary():
    model = build_model(CASES["hope"])
    tokens, targets = random_batch(CASES["hope"])
    targets[0, :5] = IGNORE
    losses, logits = model(tokens, targets).losses, model(tokens).logits
    assert logits.shape == (*tokens.shape, 61)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(
        losses
    )
    torch.testing.assert_close(losses, expected)


def test_recompute_changes_no_gradient():
    config = CASES["hope"]
    tokens, targets = random_batch(config)
    gradients = []
    for recompute in ("none", "memory", "layer"):
        model = build_model(config, recompute=recompute)
        model(tokens, targets).losses.mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-4, atol=1e-6)


def test_inner_rates_change_what_is_read():
    """The memories are written: with all inner rates at zero the same weights give other logits."""
    live, silent = (tiny_model(memory=MemoryConfig(chunk_tokens=8, eta_max=eta)) for eta in (1.0, 0.0))
    tokens, _ = random_batch(live)
    with torch.no_grad():
        difference = (build_model(live)(tokens).logits - build_model(silent)(tokens).logits).abs()
    assert difference[:, 0].max() > 0  # the causal read sees the token's own write
    assert difference.mean() > 1e-3


@pytest.mark.parametrize("family", ["hope", "titans", "deltanet"])
def test_a_block_that_never_writes_sees_what_its_convolutions_reach(family):
    """The control of the recall experiments: no training lets it answer what stood more than six tokens before."""
    config = load_model_config(
        f"{family}_tiny", ["num_layers=2", "hidden_size=32", "vocab_size=64", "memory.eta_max=0"]
    )
    model = build_model(config).eval()
    tokens, _ = random_batch(config, seq_length=40)
    other = tokens.clone()
    other[:, 20] = (tokens[:, 20] + 1) % 64
    with torch.no_grad():
        change = (model(tokens).logits - model(other).logits).abs().amax((0, 2))
    reached = change.nonzero().flatten().tolist()
    assert reached == list(range(20, 20 + 2 * (config.memory.conv_width - 1) + 1))


def test_a_fresh_block_is_static():
    """Self-memories start at W1 = 0: adaptive projections begin as the identity."""
    adaptive = tiny_model(memory=MemoryConfig(chunk_tokens=64))
    model = build_model(adaptive)
    for name, parameter in model.named_parameters():
        if name.endswith(("vector_out", "scalar_out")):
            assert not parameter.any()


def test_model_state_is_bounded():
    model = build_model(CASES["hope"])
    tokens, _ = random_batch(CASES["hope"], seq_length=64)
    with torch.no_grad():
        short = model(tokens[:, :32], return_state=True).state
        long = model(tokens, return_state=True).state
    assert long.num_bytes() == short.num_bytes()


def kept(saved, seen):
    """A pair is a copy on the host; anything else stayed where it was."""
    if isinstance(saved, tuple):
        seen.append(saved)
    return saved


@pytest.mark.parametrize("case", ["hope", "transformer"])
def test_inputs_of_layers_on_the_host_change_nothing(case, monkeypatch):
    """Bit for bit, with one copy there and one back for each layer."""
    tokens, targets = random_batch(CASES[case], seq_length=40)
    there, back, found = [], [], []
    monkeypatch.setattr(offload, "LARGE", 1)  # torch 2.11 saves an empty tensor beside each input
    to_host, from_host = offload._to_host, offload._back
    monkeypatch.setattr(offload, "_to_host", lambda x: kept(to_host(x), there))
    monkeypatch.setattr(offload, "_back", lambda x: from_host(kept(x, back)))
    for on_host in (False, True):
        model = build_model(CASES[case], recompute="layer", offload=on_host)
        model(tokens, targets).losses.sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert len(there) == len(back) == CASES[case].num_layers
    for plain, offloaded in zip(*found, strict=True):
        assert torch.equal(plain, offloaded)
