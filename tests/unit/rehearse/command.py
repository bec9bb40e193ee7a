"""`hope rehearse`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json

import pytest

from hope_megatron.cli.main import main

SMALL = ["model.num_layers=3", "training.seq_length=64", "training.global_batch_size=16", "model.vocab_size=1024"]


def test_writes_every_figure(tmp_path, capsys):
    file, picture = tmp_path / "found.json", tmp_path / "found.png"
    command = ["rehearse", "transformer_pp_tiny", *SMALL, "--world", "8", "--json", str(file), "--png", str(picture)]
    assert main(command) == 0
    found = json.loads(file.read_text())
    assert found["kernels_per_micro_batch"] < found["kernels_per_step"] < 4 * found["kernels_per_micro_batch"]
    assert found["launch_s"] == pytest.approx(sum(phase["launch_s"] for phase in found["phases"].values()))
    assert set(found["roofline_s_by_phase"]) == set(found["phases"]) >= {"forward", "backward", "reduction", "update"}
    assert sum(found["peak_memory_breakdown"].values()) == found["peak_memory_bytes"]
    assert found["flops_by_dtype"]["bfloat16"] > 100 * found["flops_by_dtype"].get("tf32", 0)  # Newton-Schulz too
    assert found["bytes_moved"] == pytest.approx(sum(phase["bytes"] for phase in found["phases"].values()))
    assert found["tokens_per_second"] == pytest.approx(16 * 64 / 8 / found["step_s"])
    assert found["bound"] == "launch"  # so small a model
    assert (
        found["host_waits_per_step"] == sum(found["host_waits"].values()) == 1
    )  # norm, loss, tokens and signals together
    reduced = [row for row in found["collectives"] if row["phase"] == "reduction"]
    assert {row["group"] for row in reduced} == {"data parallel"}
    assert {row["way"] for row in reduced} == {
        "exposed",
        "overlapped",
    }  # the last bucket has no backward left beside it
    assert picture.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "tokens/s per GPU" in printed and "What this cannot see" in printed


def test_compares_two_configurations(tmp_path, capsys):
    file = tmp_path / "found.json"
    against = "transformer_pp_tiny training.recompute=none"
    assert main(["rehearse", "transformer_pp_tiny", *SMALL, "--against", against, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["this"]["kernels_per_micro_batch"] > found["against"]["kernels_per_micro_batch"]
    assert "recompute" in found["this"]["phases"] and "recompute" not in found["against"]["phases"]
    assert "kernels per micro-batch" in capsys.readouterr().out


def test_compiling_pointwise_chains_is_a_choice_that_is_counted(tmp_path):
    file = tmp_path / "found.json"
    against = "transformer_pp_tiny training.libraries.pointwise=torch"
    assert main(["rehearse", "transformer_pp_tiny", *SMALL, "--against", against, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert 1.4 * found["this"]["kernels_per_micro_batch"] < found["against"]["kernels_per_micro_batch"]
    assert found["this"]["flops_by_dtype"] == found["against"]["flops_by_dtype"]


def test_counts_launches_of_triton_kernels(tmp_path):
    """They are as many for sequences of any length, but for sums over tokens that are split."""
    file, counts = tmp_path / "found.json", []
    for length in (512, 1024):
        values = [
            "model.num_layers=2",
            "model.vocab_size=1024",
            f"training.seq_length={length}",
            "model.memory.kernel=triton",
        ]
        assert main(["rehearse", "hope_tiny", *values, "--json", str(file)]) == 0
        found = json.loads(file.read_text())
        counts.append(found["kernels_per_micro_batch"])
        assert 10 < found["kernels_by_family"]["memories"] < found["kernels_per_step"] / 2
        assert found["flops_by_dtype"]["float32"] > 0
    assert counts[0] == counts[1] < 2000


def test_says_what_sharing_a_sequence_sends(tmp_path, capsys):
    """Attention split over heads is counted as Ulysses' closed form, whatever its key-value heads; no figure without sharing."""
    file = tmp_path / "found.json"
    shared = ["model.attention.num_kv_heads=2", "parallel.context_parallel=2", "--world", "2"]
    assert main(["rehearse", "transformer_pp_tiny", *SMALL, *shared, "--json", str(file)]) == 0
    sent = json.loads(file.read_text())["sequence_exchange"]
    assert sent["tokens for heads"] == sent["ulysses"] == 2 * (2 * 256 + 2 * 128) / 2
    assert sent["ring attention"] == 2 * 2 * 128
    assert "sends per token and layer in forward: tokens for heads 768 B" in capsys.readouterr().out


def test_says_what_passing_states_would_cost(tmp_path, capsys):
    """More ranks than heads: work of a slice, and a wait of one layer for each rank before."""
    file = tmp_path / "found.json"
    long = ["model.num_layers=3", "model.vocab_size=1024", "training.seq_length=4096", "training.global_batch_size=2"]
    assert main(["rehearse", "hope_tiny", *long, "--world", "16", "--pass-states", "8", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    passed, phases = found["passing_states"], found["phases"]
    assert found["seq_length"] == 512 and found["sequence_exchange"] is None
    each = phases["forward"]["total_s"] + phases["backward"]["total_s"]
    assert 1 < passed["serial_s"] / (7 / 3 * each) < 1.05, "states travel too"
    assert passed["step_s"] == pytest.approx(found["step_s"] + passed["serial_s"])
    assert passed["bytes_per_step"] == 2 * passed["state_bytes"]
    assert passed["tokens_per_second"] == pytest.approx(2 * 4096 / 16 / passed["step_s"])
    assert "Passing states over 8 ranks (not built)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world", "0"], "--world 0: give at least 1"),
        (["--world", "3", "parallel.tensor_parallel=2"], "world size 3 is not divisible"),
        (["--world", "2", "--rank", "2"], "the ranks of a world of 2 are 0 to 1"),
        (["--hardware", "abacus"], "no hardware row 'abacus'"),
        (["--json", "/"], "it is a directory"),
        (["--pass-states", "2"], "this model has attention"),
        (["--against", ""], "--against: give a configuration"),
    ],
)
def test_refuses_before_the_work(arguments, message, capsys):
    assert main(["rehearse", "transformer_pp_tiny", *arguments]) == 2
    assert message in capsys.readouterr().err
