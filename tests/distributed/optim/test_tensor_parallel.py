"""Megatron's column-, row- and vocabulary-parallel layers on TP 2 x DP 2 against full weights in one process."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from optim_tp_worker import TAGS, continue_tp, merge_ranks, run_reference, run_tp_cases, tags_from_layout
from optim_zero_worker import DEEP, Case, OptimSettings

from hope_megatron.testing.distributed import run_distributed

pytestmark = pytest.mark.distributed

CASES = [Case(f"stage {stage}", stage) for stage in (1, 2, 3)]
PEERS = [Case(name, 2, OptimSettings(name=name)) for name in ("muon", "adamuon", "adamw", "sgd", *DEEP)]
# One norm over both axes of the mesh, of which replicated parameters are a part once.
CLIPPED = Case("accumulation, clipping", 2, accumulation=2, clip=0.05)
CHANGING = Case("changing period", 1, changes=((4, 3), (10, 1)))
WRONG_BINDINGS = [
    r"UnboundShardError: heads is a tensor-parallel shard",
    r"UnboundShardError: parameter group 'matrix' \(heads, mixed, lookup\.weight and 2 more\) holds a flat vector of \d+ elements",
    "ZeroLayoutError: the engine runs with tensor-parallel size 2, bind_zero was given 1",
    "OptimError: bind_zero needs exchange_group",
    "ZeroLayoutError: this ZeRO wrapper steps another optimizer",
    "ZeroLayoutError: object of DeepSpeed .* is not a known ZeRO wrapper",
]
CONTROL = Case("shards as matrices", 2)


def test_tensor_parallel_equals_full_weights_and_reshards():
    results = run_distributed(run_tp_cases, 4, [*CASES, CLIPPED, *PEERS, CHANGING], CONTROL)
    for case in [*CASES, CLIPPED, *PEERS, CHANGING]:
        expected = run_reference(case)
        state = merge_ranks(results, case.name, "state")
        for name, weight in expected.items():
            assert (state[name]["fp32"] - weight).abs().max() < 1e-5, f"{case.name}, {name}"
        if case is CHANGING:
            continue
        # the lookup table, gate, up, down, four heads and the replicated matrix, each once for all four ranks
        wanted = {"m3": 9 * case.steps + 9 * case.steps // 3, "muon": 9 * case.steps, "adamuon": 9 * case.steps}
        stats = results[0][case.name]["stats"]
        assert stats.get("optim/newton_schulz_calls_total", 0) == wanted.get(case.optim.name, 0)

    expected, plain = run_reference(CASES[0]), merge_ranks(results, "plain", "state")
    for name, weight in expected.items():
        assert (plain[name]["fp32"] - weight).abs().max() < 1e-5, f"without ZeRO, {name}"

    for messages in (result["errors"] for result in results):
        for message, wanted in zip(messages, WRONG_BINDINGS, strict=True):
            assert re.match(wanted, message), message

    control = merge_ranks(results, CONTROL.name, "state")
    assert (control["down.weight"]["fp32"] - expected["down.weight"]).abs().max() > 1e-2

    # copies of what is replicated over tensor parallelism never drift apart
    by_tp = {result["tp_rank"]: result["stage 1"]["state"] for result in results}
    assert torch.equal(by_tp[0]["mixed"]["fp32"], by_tp[1]["mixed"]["fp32"])
    found = tags_from_layout(results[0], "stage 1")
    assert {n: (t.partition_dim, t.partition_stride, t.fused_parts) for n, t in found.items()} == {
        n: (t.partition_dim, t.partition_stride, t.fused_parts) for n, t in TAGS.items()
    }

    _check_resharding(results)


def _check_resharding(results):
    """TP 2 x DP 2 at ZeRO-2 -> TP 1 x DP 2 at ZeRO-3 -> TP 2 x DP 1 at ZeRO-1."""
    saved, final = merge_ranks(results, "stage 2", "saved"), merge_ranks(results, "stage 2", "state")
    middle = replace(CASES[2], name="middle", steps=9)
    at_middle = merge_ranks(run_distributed(continue_tp, 2, saved, 1, [middle], 7), "middle", "")
    last = replace(CASES[0], name="last")
    end = merge_ranks(run_distributed(continue_tp, 2, at_middle, 2, [last], 9), "last", "")
    for name, entry in final.items():
        assert (end[name]["fp32"] - entry["fp32"]).abs().max() < 1e-6, name
