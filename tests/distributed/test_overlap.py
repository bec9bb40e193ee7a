"""Gradients summed under backward: the same bits as after it, with two data-parallel ranks."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import RepeatingSource, tiny_run_config

STEPS = 3
CASES = {
    "float32": {},
    "gradients travel in bf16": {"reduce_dtype": "bf16"},
    "windows, layers recomputed": {"training": {"truncate_tokens": 16, "recompute": "layer"}},
    "weight gradients added by products": {"training": {"libraries": {"weight_gradient": "apex"}}},
    "ZeRO-2": {"zero_stage": 2},
    "tensor and sequence parallel": {"tp": 2, "sequence_parallel": True},
}


def config_of(overlap, reduce_dtype="fp32", **keywords):
    config = tiny_run_config(precision="bf16", **keywords)
    parallel = config.parallel.model_copy(update={"reduce_dtype": reduce_dtype, "overlap_comm": overlap})
    return config.model_copy(update={"parallel": parallel})


def add_product(x, d_y, main_grad):
    """What apex's kernel does."""
    main_grad.add_(d_y.float().t().matmul(x.float()))


def as_on_a_gpu(config, device):
    from hope_megatron.engine.libraries import choose_libraries

    choose_libraries(config, "cuda" if config.training.libraries.weight_gradient == "apex" else device, elsewhere=True)


def train(rank, world_size, cases):
    """By case and overlap: bits of weights and norm after three steps of two micro-batches; and whether each send was hidden."""
    from megatron.core.tensor_parallel import layers

    from hope_megatron.engine import new_engine, overlap
    from hope_megatron.parallel.distributed import init_distributed

    source, found, sends = RepeatingSource(), {}, []
    send = overlap.OverlappedReduction.send

    def noted(self, bucket, *, hidden):
        sends.append(hidden)
        send(self, bucket, hidden=hidden)

    kernels = SimpleNamespace(wgrad_gemm_accum_fp32=add_product)
    with (
        patch.object(overlap, "OVERLAPPED_NUMEL", 4000),  # several buckets of a group
        patch.object(overlap.OverlappedReduction, "send", noted),
        patch.object(layers, "fused_weight_gradient_mlp_cuda", kernels, create=True),
        patch.object(new_engine, "choose_libraries", as_on_a_gpu),
    ):
        for case in cases:
            for wanted in (False, True):
                sends.clear()
                config = config_of(wanted, **CASES[case])
                mesh = init_distributed(config.parallel)
                engine = new_engine.build_engine(config, mesh)
                for step in range(STEPS):
                    for i in range(engine.accumulation_steps):
                        row = torch.from_numpy(source.sample(8 * step + 2 * i + mesh.data_rank))[None]
                        engine.forward_backward(row[:, :-1], row[:, 1:].clone(), 64)
                    norm = engine.step(1.0)
                bits = torch.cat([p.detach().view(torch.int16).flatten() for p in engine.model.parameters()])
                found[case, wanted] = (bits.numpy().tobytes(), norm, list(sends))
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_same_bits_with_and_without(world_size):
    cases = [case for case, keywords in CASES.items() if 2 * keywords.get("tp", 1) == world_size]
    for found in run_distributed(train, world_size, cases):
        for case in cases:
            (*after, none), (*under, sends) = found[case, False], found[case, True]
            assert under == after and not none, case
            if case != "ZeRO-2":  # there DeepSpeed overlaps by itself
                assert sends.count(False) == STEPS and sends.count(True) > STEPS, "all but the last bucket are hidden"
