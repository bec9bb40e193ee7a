"""`hope plan`: the closed forms, put together for a run."""

from __future__ import annotations

import json

import pytest

from hope_megatron.cli.main import main
from hope_megatron.config import ConfigError, load_model_config
from hope_megatron.config.accounting import num_parameters
from hope_megatron.config.planned_run import load_for_plan
from hope_megatron.config.run_plan import make_plan


def test_json_adds_up(capsys):
    assert main(["plan", "hope_760m_30b", "--world", "16", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    counts = plan["parameters"]
    assert counts.pop("total") == num_parameters(load_model_config("hope_760m"))
    assert counts.pop("non_embedding") == sum(counts.values()) - counts["embedding"]
    flops = plan["flops_per_token"]
    assert flops["total"] == pytest.approx(3 * flops["forward"]["total"] + flops["recompute"])
    memory = dict(plan["bytes_per_gpu"])
    del memory["capacity"], memory["host"]
    assert memory.pop("total") == pytest.approx(sum(memory.values()))
    passes = plan["mesh"]["data_parallel"] * plan["mesh"]["accumulation_steps"]
    assert passes * plan["run"]["micro_batch_size"] == plan["run"]["global_batch_size"]
    assert plan["run"]["tokens"] == pytest.approx(30e9, rel=1e-3)


def test_preset_is_planned_at_20_tokens_per_parameter():
    config = load_for_plan("hope_340m", [])
    assert config.training.tokens / num_parameters(config.model) == pytest.approx(20, rel=1e-3)
    assert load_for_plan("hope_340m", ["training.steps=7"]).training.steps == 7


def test_file_of_a_model_or_of_a_run(tmp_path):
    (tmp_path / "mine.yaml").write_text("preset: hope_tiny\nname: mine\nnum_layers: 2\n")
    assert load_for_plan(str(tmp_path / "mine.yaml"), []).model.name == "mine"
    assert load_for_plan("hope_tiny_cpu", ["training.steps=500"]).name == "hope_tiny_cpu"


def test_a_run_of_dotted_keys_is_a_run(tmp_path):
    text = "name: dotted\nmodel.preset: hope_tiny\ndata.train: x\ndata.tokenizer: y\n"
    text += "training.steps: 7\ntraining.seq_length: 64\ntraining.global_batch_size: 2\noptim.warmup_steps: 0\n"
    (tmp_path / "run.yaml").write_text(text)
    config = load_for_plan(str(tmp_path / "run.yaml"), [])
    assert (config.name, config.training.steps, config.model.name) == ("dotted", 7, "hope_tiny")


def test_a_family_at_a_size():
    config = load_for_plan("titans_60m", ["model.memory.chunk_tokens=2"])
    assert (config.name, config.model.name, config.model.memory.chunk_tokens) == (
        "titans_60m", "titans_60m (changed)", 2
    )  # fmt: skip
    assert config.model.memory.momentum == "data"


def test_world_must_divide():
    with pytest.raises(ConfigError, match=r"world size 3 is not divisible by parallel\.tensor_parallel=2"):
        make_plan(load_for_plan("hope_tiny_cpu", []), 3, "h100")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "h900"], "no hardware row 'h900'; known: h100"),
        (["--world", "0"], "--world 0: give at least 1"),
        (["--utilization", "1.5"], "between 0 and 1"),
        (["model.num_head=8"], "did you mean model.num_heads?"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert main(["plan", "hope_tiny", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_table_shows_every_part(capsys):
    assert main(["plan", "hope_tiny", "--hardware", "cpu"]) == 0
    text = capsys.readouterr().out
    for word in ("memories", "memory solve", "recompute", "optimizer", "activations", "tokens/s", "assumed"):
        assert word in text


def test_periods_that_change_are_shown(capsys):
    levels = (
        "model.cms.levels=[{hidden_size: 64}, {hidden_size: 32, update_period_steps: 8, update_period_changes: "
        "[{from_step: 400, period: 2}, {from_step: 90000000, period: 1}]}]"
    )
    assert main(["plan", "hope_60m", levels, "training.steps=1000"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "CMS level 2 of 2: period in steps 8, from step 400 on 2, from step 90000000 on 1; 350 updates" in shown
    assert "step 90000000 is not before the run's end" in shown
    assert main(["plan", "hope_60m", "model.cms.levels.1.update_period_adaptive.longest=128"]) == 0
    assert "at first, then 1 to 128 by agreement; as many updates as it decides" in " ".join(
        capsys.readouterr().out.split()
    )


def test_what_does_not_fit_is_said(capsys):
    assert main(["plan", "hope_7b", "--hardware", "l40s"]) == 0
    assert "Does not fit" in capsys.readouterr().out
