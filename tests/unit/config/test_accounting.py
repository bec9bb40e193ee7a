"""Closed forms against what PyTorch builds, multiplies and keeps."""

from __future__ import annotations

import pytest

from hope_megatron.config import load_model_config, resolve_run_config
from hope_megatron.config.accounting import (
    forward_flops,
    memory_macs,
    num_non_embedding,
    num_parameters,
    parameters_by_part,
    recompute_flops,
    weight_table,
)
from hope_megatron.config.footprint import estimate, footprint
from hope_megatron.config.hardware import HARDWARE
from hope_megatron.config.model import ModelConfig
from hope_megatron.config.presets import config_names

SIZES = {"60m": 60e6, "340m": 340e6, "760m": 760e6, "1b3": 1.3e9, "3b": 3e9, "7b": 7e9}
STATIC = [
    "adaptive_key=false",
    "adaptive_value=false",
    "adaptive_eta=false",
    "adaptive_alpha=false",
    "own_targets=false",
]


def tiny(*memory: str) -> ModelConfig:
    """One narrow layer with these settings of the memory."""
    base = ["num_layers=1", "hidden_size=32", "num_heads=2", "cms.levels=[{hidden_size: 16}]"]
    return load_model_config("hope_tiny", base + [f"memory.{setting}" for setting in memory])


def run_of(model: str, *overrides: str):
    data = {
        "name": "test",
        "model": model,
        "training": {"steps": 100, "seq_length": 1024, "global_batch_size": 64},
        "optim": {"warmup_steps": 0},
        "data": {"train": "a", "tokenizer": "b"},
    }
    return resolve_run_config(data, overrides, source="test")


@pytest.mark.parametrize(("size", "nominal"), SIZES.items())
def test_presets_have_their_nominal_size(size, nominal):
    assert num_parameters(load_model_config(f"hope_{size}")) == pytest.approx(nominal, rel=0.05)


@pytest.mark.parametrize("size", ["tiny", *SIZES])
def test_baseline_has_the_parameters_of_its_hope(size):
    hope, baseline = (num_parameters(load_model_config(f"{kind}_{size}")) for kind in ("hope", "transformer_pp"))
    assert baseline == pytest.approx(hope, rel=0.02)


@pytest.mark.parametrize("name", config_names("models"))
def test_presets_divide_by_tensor_parallel(name):
    heads = load_model_config(name).num_heads
    largest = max(tp for tp in (1, 2, 4, 8) if heads % tp == 0)
    assert largest >= 4
    model = f"model={name}"
    run_of(name, model, f"parallel.tensor_parallel={largest}", "parallel.sequence_parallel=true")


def test_parameters_by_hand():
    """The formulas, written out once for one small model."""
    model = load_model_config("hope_tiny")
    D, H, d, V, layers = 256, 4, 64, 4096, 4
    memories = H * (5 * d * d + 3 * d * d + 2 * d)  # W2 of five memories; W1 of three vector and two scalar ones
    mixer = D * 3 * H * d + H * d * D + D * 2 * H + 2 * H + 3 * H * d * 4 + memories + d + D
    cms = 2 * (D + 3 * D * 256)
    assert num_parameters(model) == V * D + layers * (mixer + cms) + D
    assert num_non_embedding(model) == num_parameters(model) - V * D
    assert sum(parameters_by_part(model).values()) == num_parameters(model)


def test_every_option_changes_the_count():
    base = num_parameters(tiny())
    for setting in (
        "decay=constant",
        "momentum=data",
        "momentum=constant",
        "conv_width=1",
        "hidden_size=8",
    ):
        assert num_parameters(tiny(setting)) != base, setting
    assert num_parameters(tiny("decay=none", "adaptive_alpha=false")) != num_parameters(tiny("adaptive_alpha=false"))
    assert num_parameters(tiny("output_gate=silu")) == base + 32 * 32


def test_slow_levels_keep_their_period():
    periods = {row.update_period_steps for row in weight_table(load_model_config("hope_760m")) if row.part == "cms"}
    assert periods == {1, 4, 16}


def test_linear_flops_are_twice_the_weights():
    model = load_model_config("transformer_pp_tiny")
    layers = parameters_by_part(model)
    expected = 2 * (layers["projections"] + layers["cms"] + layers["embedding"])
    assert forward_flops(model, 128).outer == expected


def test_attention_flops_grow_with_the_context_up_to_the_window():
    full, window = (load_model_config("transformer_pp_tiny", [f"attention.window_tokens={w}"]) for w in ("null", "64"))
    by_hand = sum(2 * 2 * 256 * 4 * min(t + 1, 64) for t in range(256)) / 256
    assert forward_flops(window, 256).attention == pytest.approx(by_hand)
    assert forward_flops(full, 256).attention == 2 * 2 * 256 * 4 * (256 + 1) / 2


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("T", [32, 39])
def test_segment_flops_equal_those_pytorch_counts(T):
    """ARMT: every product of a forward pass, but for attention, which PyTorch computes without using that it is causal."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from hope_megatron.model import build_model

    keys = ["num_layers=2", "hidden_size=32", "num_heads=4", "attention.segment_tokens=8", "attention.memory_tokens=3"]
    config = load_model_config("transformer_pp_tiny", keys)
    model, tokens = build_model(config), torch.zeros(1, T, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for operator, n in counts.items() if "attention" not in str(operator))
    assert T * (forward_flops(config, T).total - forward_flops(config, T).attention) == pytest.approx(products)
    pairs = sum(t * (t + 1) / 2 for t in [11] * (T // 8) + [T % 8])
    assert T * forward_flops(config, T).attention == pytest.approx(2 * 2 * 2 * 32 * pairs)


def test_recompute_is_the_memories_or_a_forward_without_the_head():
    model = load_model_config("hope_tiny")
    flops = forward_flops(model, 128)
    assert recompute_flops(model, 128, "none") == 0
    assert recompute_flops(model, 128, "memory") == flops.memory
    assert recompute_flops(model, 128, "layer") == flops.total - 2 * 4096 * 256 + flops.memory


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["self_chunk_tokens=8"],
        ["self_chunk_tokens=64"],
        ["read=chunk_start"],
        ["decay_to=zero"],
        ["hidden_size=24"],
        ["momentum=data", "self_chunk_tokens=16"],
        ["momentum=constant", "dgd_layers=input", "eta_max=0.01"],
        ["dgd_layers=none", "eta_max=0.01"],
        ["objective=l2", "eta_max=0.01"],
        ["written_layers=output"],
        ["written_layers=output", "momentum=data", "self_chunk_tokens=8"],
        ["written_layers=output", "objective=l2", "dgd_layers=none", "eta_max=0.01"],
        ["own_targets=false"],
        ["adaptive_key=false", "adaptive_alpha=false"],
        ["adaptive_query=true"],
        ["adaptive_query=true", "adaptive_key=false", "self_chunk_tokens=8"],
        STATIC,
        ["num_layers=1", "decay=none", *STATIC],
        ["num_layers=1", "momentum=constant", *STATIC],
        ["weights=softmax", "objective=l2", "dgd_layers=none", "eta_max=0.01", "row_sum=2", *STATIC],
        ["num_layers=1", "dgd_layers=input", "rates_of=channel", "decay_to=zero", *STATIC],
    ],
    ids=" ".join,
)
def test_memory_flops_equal_those_pytorch_counts(settings):
    """The operator's matrix products in a forward pass, counted by PyTorch's dispatcher."""
    model, T = tiny(*settings), 128
    assert 2 * sum(memory_macs(model, T)) == pytest.approx(_counted_flops(model, T), rel=FLOPS_TOLERANCE)


FLOPS_TOLERANCE = 1e-9


def _counted_flops(model: ModelConfig, T: int) -> float:
    """FLOPs per token and head that a forward pass of the memory operator executes."""
    import math

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from hope_megatron.ops.memory import MemoryCompute, memory_chunked

    def solve_flops(matrix, *args, out_shape=None, **kwargs):
        return math.prod(matrix[:-2]) * matrix[-1] ** 3

    def baddbmm_flops(total, left, right, *args, out_shape=None, **kwargs):
        return 2 * math.prod(left) * right[-1]

    uncounted = {torch.ops.aten.linalg_solve_triangular: solve_flops, torch.ops.aten.baddbmm_: baddbmm_flops}
    with FlopCounterMode(display=False, custom_mapping=uncounted) as counter:
        # compiled code is out of the dispatcher's sight
        memory_chunked(*_operator_inputs(model, B=1, T=T), compute=MemoryCompute(kernel="torch"))
    return counter.get_total_flops() / (T * model.num_heads)


def _operator_inputs(model: ModelConfig, *, B: int, T: int):
    import torch

    from hope_megatron.ops.memory import Bank, MemoryParams, RateLogits

    memory, H, d, h = model.memory, model.num_heads, model.head_dim, model.memory_hidden

    def random(*shape):
        return (0.1 * torch.randn(*shape)).requires_grad_()

    def bank(n, outputs):
        if n == 0:
            return None
        return (
            Bank(random(H, n, h, d), random(H, n, outputs, h))
            if memory.num_layers == 2
            else Bank(None, random(H, n, d, d))
        )

    params = MemoryParams(
        bank(1, d),
        bank(memory.num_vector, d),
        bank(memory.num_scalar, 1),
    )
    each = (d,) if memory.rates_of == "channel" else ()
    rates = [
        random(B, T, H, *each) if there else None for there in (True, memory.decay != "none", memory.momentum != "none")
    ]
    return *(random(B, T, H, d) for _ in range(3)), RateLogits(*rates), params, memory.rule


def test_footprint_by_hand():
    # bf16 gradients are dropped once they are added to float32 sums
    keys = ("optim.name=adamw", "training.micro_batch_size=2", "parallel.tensor_parallel=2")
    run, averaging = (run_of("transformer_pp_tiny", *keys, f"training.ema={decay}") for decay in (0.0, 0.99))
    model = run.model
    replicated = 256 * (2 * 4 + 1)
    local = (num_parameters(model) - replicated) / 2 + replicated
    assert footprint(run, 8).weights == 2 * local
    assert footprint(run, 8).gradients == 4 * local
    assert footprint(run, 8).optimizer == 12 * local / 4
    assert footprint(averaging, 8).optimizer == 16 * local / 4
    assert footprint(run_of("transformer_pp_tiny", "parallel.zero_stage=3"), 8).weights == 2 * num_parameters(model) / 8


@pytest.mark.parametrize(
    ("name", "states"), [("m3", 16), ("adamw", 8), ("adamuon", 8), ("muon", 4), ("sgd", 4), ("dmgd", 8)]
)
def test_optimizer_bytes(name, states):
    run = run_of("transformer_pp_tiny", f"optim.name={name}", "training.precision=fp32")
    matrices = sum(row.total for row in weight_table(run.model) if row.matrix)
    vectors = num_parameters(run.model) - matrices
    expected = (4 + states) * matrices + (4 + (4 if name == "sgd" else 8)) * vectors
    assert footprint(run, 1).optimizer == expected


def test_offload_moves_the_optimizer_to_the_host():
    on_gpu, offloaded = (footprint(run_of("hope_tiny", f"parallel.cpu_offload={x}"), 4) for x in ("false", "true"))
    assert (offloaded.optimizer, offloaded.host) == (0, on_gpu.optimizer)
    assert offloaded.total < on_gpu.total


def test_recompute_trades_activations_for_flops():
    kept, recomputed = (run_of("transformer_pp_tiny", f"training.recompute={x}") for x in ("none", "layer"))
    assert footprint(recomputed, 1).activations < footprint(kept, 1).activations / 2
    slower = estimate(recomputed, 1, HARDWARE["h100"])
    assert slower.hours > estimate(kept, 1, HARDWARE["h100"]).hours
    assert slower.mfu < slower.utilization


def test_weights_that_are_kept_less_often_take_less():
    often, seldom = (
        footprint(run_of("hope_tiny", "training.recompute=memory", f"model.memory.keep_every={n}"), 1, on_gpu=False)
        for n in (1, 8)
    )
    assert often.memory_states == pytest.approx(8 * seldom.memory_states)
    assert often.activations < seldom.activations


def test_estimate_by_hand():
    run = run_of("hope_tiny")
    flops = 3 * forward_flops(run.model, 1024).total * run.training.tokens
    seconds = flops / (4 * 989.4e12 * 0.5)
    assert estimate(run, 4, HARDWARE["h100"], 0.5).hours == pytest.approx(seconds / 3600)


@pytest.mark.parametrize(
    ("model", "precision"), [("hope_tiny", "fp32"), ("hope_tiny", "bf16"), ("memora_tiny", "fp32")]
)
def test_memories_in_pytorch_keep_what_is_planned(model, precision):
    settings = [
        "model.memory.kernel=torch",
        "model.num_layers=2",
        "training.seq_length=128",
        "training.micro_batch_size=2",
    ]
    run = run_of(model, f"training.precision={precision}", *settings)
    bytes_ = footprint(run, 1, on_gpu=False)
    assert bytes_.memory_states + bytes_.activations == pytest.approx(_kept_bytes(run), rel=0.25)


def _kept_bytes(run) -> int:
    """Bytes of distinct storages that autograd holds between forward and backward, parameters left out."""
    import torch

    from hope_megatron.model import build_model
    from hope_megatron.parallel.distributed import init_distributed

    init_distributed(run.parallel)
    dtype = torch.bfloat16 if run.training.precision == "bf16" else torch.float32
    model = build_model(run.model, run.parallel, dtype=dtype, recompute="none")
    tokens = torch.zeros(run.training.micro_batch_size, run.training.seq_length, dtype=torch.long)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(tokens, tokens)
    del result
    return sum(storage.nbytes() for storage in storages.values())
