"""`hope plan`: time by phase with its interval, the search for settings, and calibration by a run."""

from __future__ import annotations

import json

import pytest

from hope_megatron.cli.main import main
from hope_megatron.config import dump_config
from hope_megatron.config.base import ConfigError
from hope_megatron.config.footprint import footprint
from hope_megatron.config.hardware import find_hardware
from hope_megatron.config.planned_run import load_for_plan
from hope_megatron.config.roofline import Transfer, seconds_by_limit, transfer_seconds
from hope_megatron.config.step_time import step_time, step_works
from hope_megatron.config.tuning import HEADROOM, best_choices, changed_config
from hope_megatron.runtime.records import seal

H100 = find_hardware("h100")


def test_a_step_takes_its_phases_and_lies_in_its_interval():
    found = step_time(load_for_plan("hope_760m_30b", []), 8, H100)
    assert set(found.phases) == {"forward", "recompute", "backward", "reduction", "update"}
    assert found.seconds == pytest.approx(sum(phase.total for phase in found.phases.values()))
    assert found.fastest_s < found.seconds < found.slowest_s
    assert found.bound in ("launch", "memory", "math", "network")


# github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md: H100, bf16, dense models of these sizes, FSDP
PUBLISHED = [
    ("transformer_pp_760m", 8, 4096, 12, 192, 55_459),
    ("transformer_pp_1b3", 8, 2048, 14, 112, 45_455),
    ("transformer_pp_1b3", 64, 2048, 20, 1280, 44_402),
]


@pytest.mark.parametrize(("model", "world", "length", "micro_batch", "batch", "tokens_per_second"), PUBLISHED)
def test_published_speeds_lie_in_the_interval(model, world, length, micro_batch, batch, tokens_per_second):
    sizes = [
        f"training.seq_length={length}",
        f"training.micro_batch_size={micro_batch}",
        f"training.global_batch_size={batch}",
    ]
    found = step_time(load_for_plan(model, [*sizes, "training.recompute=none"]), world, H100)
    slowest, fastest = (found.tokens_per_second / world * found.seconds / s for s in (found.slowest_s, found.fastest_s))
    assert slowest < tokens_per_second < fastest
    assert fastest < 2 * slowest


def test_launches_and_latency_are_told_apart():
    small = step_time(load_for_plan("hope_760m", ["training.micro_batch_size=1"]), 8, H100)
    assert (small.bound, small.limit) == ("launch", "latency")  # loops over chunks, not launches
    shares = seconds_by_limit(small.phases)
    assert sum(shares.values()) == pytest.approx(small.seconds)
    assert shares["latency"] == max(shares.values())


@pytest.mark.parametrize(
    ("operator", "ranks", "bandwidth"),
    [
        ("allreduce", range(8), 360e9),  # inside a node, of 450
        ("allreduce", range(16), 340e9),  # eight ports of a node, of 50 each
        ("allreduce", range(0, 32, 8), 42.5e9),  # one rank of each node
        ("alltoall", range(16), 42.5e9),  # each rank by its own port
    ],
)
def test_ranks_of_a_node_share_its_ports(operator, ranks, bandwidth):
    n = len(ranks)
    share = (2 if operator == "allreduce" else 1) * (n - 1) / n
    transfer = Transfer("reduction", operator, "data parallel", tuple(ranks), 0, 1e9, False)
    assert transfer_seconds(transfer, H100) == pytest.approx(share * 1e9 / bandwidth)


def test_launches_bind_small_micro_batches():
    times = [step_time(load_for_plan("hope_760m", [f"training.micro_batch_size={n}"]), 8, H100) for n in (2, 8)]
    # a few more where streams of self-memories go in several launches
    assert times[0].phases["forward"].launch == pytest.approx(4 * times[1].phases["forward"].launch, rel=0.03)
    assert times[0].seconds > times[1].seconds


def test_what_is_not_counted_is_said(capsys):
    assert main(["plan", "titans_60m"]) == 0
    assert "time by phase unknown" in capsys.readouterr().out
    assert main(["plan", "titans_60m", "--tune"]) == 2
    assert "hope rehearse --against" in capsys.readouterr().err


def test_the_best_five_fit_and_are_no_slower_than_what_was_given():
    config = load_for_plan("hope_760m_30b", [])
    choices = best_choices(config, 8, H100)
    assert len(choices) == 5
    seconds = [choice.time.seconds for choice in choices]
    assert seconds == sorted(seconds) and seconds[0] <= step_time(config, 8, H100).seconds
    for choice in choices:
        changed = changed_config(config, choice.changes)
        planned = footprint(changed, 8).total
        assert planned == choice.memory_bytes <= HEADROOM * H100.memory_bytes
        assert changed.training.tokens_per_step == config.training.tokens_per_step


def test_sequences_of_a_million_tokens_are_split_over_ranks_and_cut_where_nothing_fits_whole(capsys):
    million = ["plan", "hope_760m", "--world", "64", "--seq", "1048576", "--tune"]
    assert main([*million, "--json"]) == 0
    *choices, short = json.loads(capsys.readouterr().out)
    assert short["seq_length"] == 4096 and short["tokens_per_second_per_gpu"] > choices[0]["tokens_per_second_per_gpu"]
    assert short["bound"] and len(choices) == 5
    for choice in choices:
        config = load_for_plan("hope_760m", choice["overrides"])  # refuses what does not go together
        assert config.training.seq_length == 1048576 and config.parallel.context_parallel > 1
        assert config.training.global_batch_size == 8, "64 GPUs in groups of 8, with 24 heads"
        assert config.training.truncate_tokens and choice["memory_bytes"] <= HEADROOM * H100.memory_bytes
    assert main(million) == 0
    printed = capsys.readouterr().out
    assert "bound by the latency of small kernels" in printed and "nothing fits without windows" in printed
    assert "at 4,096 tokens: " in printed


def test_activations_on_the_host_cost_the_bus():
    plain, offloaded = (
        load_for_plan("transformer_pp_760m", [f"training.offload_activations={x}", "training.micro_batch_size=8"])
        for x in ("false", "true")
    )
    inputs = 8 * 4096 * 24 * 1536 * 2
    assert footprint(offloaded, 8).host == inputs
    assert footprint(plain, 8).total - footprint(offloaded, 8).total == pytest.approx(inputs * 23 / 24)
    times = [step_time(config, 8, H100) for config in (plain, offloaded)]
    copies = 2 * offloaded.accumulation_steps(8) * inputs / (0.8 * 63e9)
    assert times[1].seconds - times[0].seconds == pytest.approx(copies)


def test_context_parallelism_divides_tokens_and_shards():
    whole = load_for_plan("hope_760m", ["training.seq_length=65536", "training.micro_batch_size=1"])
    split = changed_config(whole, {"parallel.context_parallel": 8})
    one, eighth = (step_works(config, 64) for config in (whole, split))
    assert split.accumulation_steps(64) == 8 * whole.accumulation_steps(64)  # as much for a rank, in slices
    products = [sum(works["forward"]["products"].flops.values()) for works in (one, eighth)]
    assert products[0] == pytest.approx(products[1])
    assert one["update"]["pointwise"].bytes == eighth["update"]["pointwise"].bytes, "ZeRO shards over all 64"
    assert eighth["forward"]["memories"].steps == 8 * one["forward"]["memories"].steps, (
        "chunks of all tokens, each time"
    )


def test_where_nothing_fits_the_nearest_is_named():
    with pytest.raises(ConfigError, match=r"nearest is \d+ GB with .*; take more devices, .*training.truncate_tokens"):
        best_choices(load_for_plan("hope_7b", []), 1, H100)


def test_the_winner_is_written_as_keys_of_a_run_file(tmp_path, capsys):
    out = tmp_path / "best.yaml"
    assert main(["plan", "transformer_pp_760m", "--world", "8", "--tune", "--json", "--out", str(out)]) == 0
    best = json.loads(capsys.readouterr().out)[0]["overrides"]
    assert out.read_text().splitlines()[1:] == [text.replace("=", ": ", 1) for text in best]


def test_a_run_calibrates_the_plan(tmp_path, capsys):
    config = load_for_plan("transformer_pp_760m_30b", [])
    slow = 2 * step_time(config, 8, H100).seconds
    (tmp_path / "config.yaml").write_text(dump_config(config))
    records = [{"step": i, "speed/tokens_per_s": config.training.tokens_per_step / slow} for i in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(seal(record) + "\n" for record in records))
    out = tmp_path / "cluster.json"
    assert main(["plan", "--calibrate", str(tmp_path), "--world", "8", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["plan", "transformer_pp_760m_30b", "--world", "8", "--json", "--efficiency", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["time"]["step_s"] == pytest.approx(slow, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hope_tiny", "--out", "x"], "--out FILE is written by --tune or --calibrate"),
        (["--calibrate", "nowhere", "--out", "x"], "--calibrate RUN wants --world N"),
        (["--calibrate", "nowhere", "--out", "x", "--world", "8"], "it has no config.yaml"),
        (["hope_tiny", "--efficiency", "nowhere.json"], "has no efficiencies"),
        (["hope_760m", "--tune", "--seq", "0"], "--seq 0: give the length"),
        ([], "give a run file, a model file"),
    ],
)
def test_mistakes(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err
