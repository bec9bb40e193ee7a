"""Gradients summed under backward: the same bits as after it, on two ranks."""

from __future__ import annotations

import pytest
import torch

from hope_megatron.testing.distributed import run_distributed
from hope_megatron.testing.tiny import RepeatingSource, tiny_run_config

CASES = [(1, "fp32"), (1, "bf16"), (2, "fp32")]
"""(ZeRO stage, dtype in which gradients travel)."""


def train(rank, world_size):
    """Bits of the weights after three steps of two micro-batches, by case and overlap; and sends before backward's end."""
    from unittest.mock import patch

    from hope_megatron.engine import overlap
    from hope_megatron.engine.new_engine import build_engine
    from hope_megatron.parallel.distributed import init_distributed

    source, found, early = RepeatingSource(), {}, []
    send = overlap.OverlappedReduction.send

    def noted(self, bucket, *, hidden):
        early.append(hidden)
        send(self, bucket, hidden=hidden)

    overlap.OVERLAPPED_NUMEL = 4000  # several buckets of a group
    with patch.object(overlap.OverlappedReduction, "send", noted):
        for stage, dtype in CASES:
            for wanted in (False, True):
                config = tiny_run_config(zero_stage=stage, precision="bf16")
                parallel = config.parallel.model_copy(update={"reduce_dtype": dtype, "overlap_comm": wanted})
                config = config.model_copy(update={"parallel": parallel})
                mesh = init_distributed(config.parallel)
                engine = build_engine(config, mesh)
                for step in range(3):
                    for i in range(engine.accumulation_steps):
                        row = torch.from_numpy(source.sample(8 * step + 2 * i + rank))[None]
                        engine.forward_backward(row[:, :-1], row[:, 1:].clone(), 64)
                    norm = engine.step(1.0)
                bits = [p.detach().view(torch.int16).flatten() for p in engine.model.parameters()]
                found[stage, dtype, wanted] = (torch.cat(bits).numpy().tobytes(), norm)
    return found, early


@pytest.mark.distributed
def test_same_bits_with_and_without():
    for found, early in run_distributed(train, 2):
        for stage, dtype in CASES:
            assert found[stage, dtype, True] == found[stage, dtype, False], (stage, dtype)
        assert early.count(True) > 12, "nothing was sent before backward's end"
        assert early.count(False) == 6  # the last bucket of each step alone
