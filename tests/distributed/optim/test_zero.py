"""M3 inside real DeepSpeed engines against the literal single-process reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
from optim_zero_worker import Case, OptimSettings, run_cases, run_continue, run_reference, run_resume, run_skipped_steps

from hope_megatron.testing.distributed import run_distributed

pytestmark = pytest.mark.distributed

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
STAGES = [Case(f"stage {stage}", stage) for stage in (1, 2, 3)]
SETTINGS = [
    Case("paper", 2, OptimSettings(form="paper", lr=1e-3)),
    Case("round robin, overlap", 2, zero={"round_robin_gradients": True, "overlap_comm": True}),
    Case("offload 2", 2, zero=OFFLOAD),
    Case("offload 3", 3, zero=OFFLOAD),
    Case("small sub-groups", 3, zero={"sub_group_size": 60}),
    *(Case(f"accumulation, clipping {stage}", stage, accumulation=2, clip=0.05) for stage in (1, 2, 3)),
    *(Case(f"bf16 {stage}", stage, dtype="bfloat16") for stage in (2, 3)),
    Case("bf16 optimizer", 1, dtype="bfloat16", fp32_accumulation=True),
]
PEERS = [
    Case(f"{name}, stage {stage}", stage, OptimSettings(name=name))
    for name in ("muon", "adamuon", "adamw", "sgd")
    for stage in (1, 2, 3)
]
# Each deep optimizer once per stage, with another of its settings each time.
DEEP_CASES = [
    Case(f"{name}, stage {stage}", stage, OptimSettings(name=name, **changes), clip=clip)
    for name, settings in {
        "dgd": ({}, {"form": "paper", "delta": 1.0, "momentum": 0.0, "nesterov": False}, {"nesterov": False}),
        "delta_momentum": ({}, {"form": "paper", "delta": 1.0, "lr": 1e-2}, {"momentum_output": "newton_schulz"}),
        "dmgd": ({}, {"inner_objective": "dot", "inner_lr": 0.1}, {"momentum_output": "newton_schulz"}),
    }.items()
    for stage, changes, clip in zip((1, 2, 3), settings, (0.0, 1.0, 0.0))
]
# Updates at steps 2, 4, 7, 10, 11 and 12: as many as with a period of 2.
CHANGES = ((4, 3), (10, 1))
CHANGING = [
    Case("changing period, stage 1", 1, changes=CHANGES),
    Case("changing period, stage 3", 3, changes=CHANGES),
    Case("changing period, dgd", 1, OptimSettings(name="dgd", form="paper", lr=1e-2), changes=CHANGES),
]
# Batched and single matrix products differ in the last bit, and 12 steps of Newton-Schulz and division pass it on. In bf16 that bit
# can turn the rounding of one weight, which moves every gradient of the next step by 1 / 256 of that weight's share.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-4}


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [(2, STAGES + SETTINGS + PEERS + DEEP_CASES + CHANGING), (3, STAGES), (4, STAGES)],
    ids=["2", "3", "4"],
)
def test_trajectory_equals_reference(world_size, cases):
    results = run_distributed(run_cases, world_size, cases)
    for case in cases:
        expected = run_reference(case, world_size)
        for result in results:
            for name, weight in expected.items():
                difference = (result[case.name]["state"][name]["fp32"] - weight).abs().max()
                assert difference < TOLERANCE[case.dtype], f"{case.name}, {name}: {difference:.1e}"
        # a plain matrix, three of the stack, three fused parts every step; the slow level's every other one
        if case.optim.name != "m3":
            continue
        stats = results[0][case.name]["stats"]
        slow_ticks = 7 * (case.steps // 3) + case.steps // 2 // 3
        assert stats["optim/newton_schulz_calls_total"] == 7 * case.steps + case.steps // 2 + slow_ticks, case.name
        assert 0 < stats["optim/orthogonality_residual"] < 0.6
        assert stats["optim/exchange_bytes"] > 0


@pytest.mark.parametrize(("name", "changes"), [("m3", ()), ("dmgd", ()), ("m3", ((4, 5), (9, 1)))])
def test_resume_is_bitwise_and_state_reshards(name, changes):
    """Saved at step 7: inside a slow period of three, and with half a gradient pending in the group of period two, or with three
    fifths after its period has changed."""
    case = Case("source", 2, OptimSettings(name=name), steps=12, changes=changes)
    results = run_distributed(run_resume, 2, case, 7)
    expected = results[0]["undisturbed"]
    assert any(
        entry.get("pending_grad") is not None and entry["pending_grad"].any() for entry in results[0]["saved"].values()
    )
    for result in results:
        _assert_same(result["stage 2"], expected, 0.0)
        _assert_same(result["stage 1"], expected, 1e-6)
        _assert_same(result["stage 3"], expected, 1e-6)
    cases = [replace(case, name=f"stage {stage}", stage=stage) for stage in (1, 3)]
    resharded = run_distributed(run_continue, 3, results[0]["saved"], cases, 7)
    for result in resharded:
        for other in cases:
            _assert_same(result[other.name], expected, 1e-6)


def test_steps_skipped_for_non_finite_gradients_and_fp16_overflow_touch_no_state():
    runs = [(name, "float16") for name in ("m3", "muon", "adamuon", "adamw", "sgd", "dmgd")] + [("m3", "float32")]
    cases = [
        Case(f"{name}, stage {stage}, {dtype}", stage, OptimSettings(name=name), dtype=dtype)
        for name, dtype in runs
        for stage in (1, 2, 3)
    ]
    for result in run_distributed(run_skipped_steps, 2, cases):
        for case in cases:
            states = result[case.name]
            _assert_same(states["after"], states["before"], 0.0)
            assert {entry["step"] for entry in states["after"].values()} == {3}, case.name


def _assert_same(state, expected, tolerance):
    """`tolerance` is that of weights; Newton-Schulz turns the same noise into ten times as much in the moments."""
    assert state.keys() == expected.keys()
    for name, entry in expected.items():
        assert state[name].keys() == entry.keys()
        for key, value in entry.items():
            if key == "step":
                assert state[name][key] == value
            else:
                atol = tolerance if key == "fp32" else 10 * tolerance
                difference = (state[name][key] - value).abs().max()
                assert difference <= atol, f"{name}.{key}: {difference:.1e}"
