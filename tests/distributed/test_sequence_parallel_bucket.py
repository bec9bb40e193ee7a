"""Gradients of norms under sequence parallelism, summed over tensor-parallel ranks once a step in one bucket."""

from __future__ import annotations

import pytest
import torch

from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import tiny_run_config


def norms_after_steps(rank, world_size):
    """Norm weights (float32) of this rank after two steps, with the bucket and with a sum for each parameter."""
    from unittest.mock import patch

    from hope_megatron.engine import engine as engine_module
    from hope_megatron.engine.new_engine import build_engine
    from hope_megatron.parallel.distributed import init_distributed
    from hope_megatron.testing.optim_state import export_state

    config = tiny_run_config(tp=2, sequence_parallel=True, zero_stage=1, precision="bf16")
    mesh = init_distributed(config.parallel)
    tokens = torch.randint(
        0, config.model.vocab_size, (4, config.training.seq_length + 1), generator=torch.manual_seed(0)
    )
    found = []
    for in_bucket in (True, False):
        with patch.object(engine_module, "keeps_whole_gradients", lambda *args, chosen=in_bucket: chosen):
            engine = build_engine(config, mesh)
        assert (engine._bucket is not None) is in_bucket
        for _ in range(2):
            for row in tokens.split(1):
                engine.forward_backward(row[:, :-1], row[:, 1:], tokens[:, 1:].numel())
            engine.step()
        state = export_state(engine.optimizer)
        found.append({n: entry["fp32"].tolist() for n, entry in state.items() if n.endswith("norm.weight")})
    return found


@pytest.mark.distributed
def test_the_bucket_gives_what_a_sum_for_each_parameter_gives():
    (bucket, single), (other, _) = run_distributed(norms_after_steps, 2, timeout_s=280)
    assert bucket and bucket.keys() == single.keys()
    for name, weight in bucket.items():
        assert weight == other[name]  # or ranks drift apart
        assert weight != [1.0] * len(weight)
        assert weight == pytest.approx(single[name], abs=2e-3)  # those are summed in bf16
