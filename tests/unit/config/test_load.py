"""Loading: layers merge as documented, and every mistake is one readable line with its key and its source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hope_megatron.config import (
    ConfigError,
    RunConfig,
    dump_config,
    load_model_config,
    load_run_config,
    resolve_run_config,
)
from hope_megatron.config.load import read_mapping
from hope_megatron.config.presets import config_names

RUN = """\
name: test
model:
  preset: hope_tiny
  vocab_size: 8192
training: {steps: 1000, seq_length: 512, global_batch_size: 8}
data: {train: shards/train, tokenizer: shards/tokenizer.model}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def failure(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, overrides)
    return str(caught.value)


def test_section_lies_over_its_preset(run_file):
    model = load_run_config(run_file).model
    assert (model.vocab_size, model.hidden_size, len(model.cms.levels)) == (8192, 256, 2)


@pytest.mark.parametrize(
    "model",
    [
        "model: {preset: hope_tiny, vocab_size: 8192}",
        "model.preset: hope_tiny\nmodel.vocab_size: 8192",
        "model.vocab_size: 8192\nmodel.preset: hope_tiny",
        "model.preset: hope_tiny\nmodel: {vocab_size: 8192}",
        "model: hope_tiny\nmodel.vocab_size: 8192",
    ],
)
def test_a_preset_may_be_a_dotted_key(run_file, model):
    run_file.write_text(RUN.replace("model:\n  preset: hope_tiny\n  vocab_size: 8192", model))
    found = load_run_config(run_file).model
    assert (found.vocab_size, found.hidden_size, len(found.cms.levels)) == (8192, 256, 2)
    assert load_run_config(run_file, ["model.preset=transformer_pp_tiny"]).model.vocab_size == 8192


@pytest.mark.parametrize(
    ("overrides", "lr"),
    [
        ([], 8e-3),  # the best of docs/records/2026-11-24-optimizers.md on every task
        (["optim.name=muon"], 8e-3),
        (["optim.name=adamuon"], 8e-3),
        (["optim.name=adamw"], 2e-3),
        (["optim.name=sgd"], 2e-3),
        (["optim.name=adamw", "optim.lr=1e-4"], 1e-4),
        (["optim.warmup_steps=5"], 8e-3),
    ],
)
def test_the_learning_rate_follows_the_optimizer(run_file, overrides, lr):
    config = load_run_config(run_file, overrides)
    assert config.optim.lr == lr
    assert resolve_run_config(read_mapping_of(dump_config(config), run_file), source="dump") == config


@pytest.mark.parametrize("model", ["model: hope_60m", "model: {preset: hope_60m}"])
def test_two_presets_are_refused(run_file, model):
    run_file.write_text(
        RUN.replace("model:\n  preset: hope_tiny\n  vocab_size: 8192", f"{model}\nmodel.preset: hope_tiny")
    )
    assert "model.preset is given beside another model" in failure(run_file)


@pytest.mark.parametrize(
    ("model", "overrides", "name"),
    [
        ("model: hope_tiny", [], "hope_tiny"),
        ("model: {preset: hope_tiny}", ["optim.lr=1"], "hope_tiny"),
        ("model: {preset: hope_tiny, hidden_size: 256}", [], "hope_tiny"),  # what it is anyway
        ("model: hope_tiny", ["model.memory.chunk_tokens=32"], "hope_tiny"),
        ("model: {preset: hope_tiny, num_layers: 1}", [], "hope_tiny (changed)"),
        ("model: {preset: hope_tiny, num_layers: 1}", ["model.num_heads=2"], "hope_tiny (changed)"),
        ("model: hope_tiny\nmodel.num_layers: 1", [], "hope_tiny (changed)"),
        ("model: hope_tiny", ["model.cms.levels.0.hidden_size=64"], "hope_tiny (changed)"),
        ("model: titans_tiny", [], "titans_tiny"),
        ("model: titans_tiny", ["model.memory.momentum=none"], "titans_tiny (changed)"),
        ("model: {preset: titans_tiny, num_layers: 1}", [], "titans_tiny (changed)"),
        ("model: {preset: hope_tiny, num_layers: 1, name: mine}", [], "mine"),
        ("model: {preset: hope_tiny, num_layers: 1}", ["model.name=mine"], "mine"),
        ("model: hope_tiny", ["model=hope_60m"], "hope_60m"),
    ],
)
def test_a_changed_preset_does_not_keep_its_name(run_file, model, overrides, name):
    run_file.write_text(RUN.replace("model:\n  preset: hope_tiny\n  vocab_size: 8192", model))
    config = load_run_config(run_file, overrides)
    assert config.model.name == name
    assert resolve_run_config(read_mapping_of(dump_config(config), run_file), source="dump").model.name == name


def test_later_layers_win(run_file):
    run = load_run_config(run_file, ["model.vocab_size=100", "optim.lr=1e-3", "model.vocab_size=200"])
    assert (run.model.vocab_size, run.optim.lr) == (200, 1e-3)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("training.steps", "0200", 200),
        ("training.steps", "0x100", 256),
        ("training.steps", "0o400", 256),
        ("training.seed", "0123", 123),
        ("optim.lr", "0010", 10.0),
        ("optim.lr", "1e-3", 1e-3),
    ],
)
def test_numbers_are_those_of_yaml_1_2_in_files_and_overrides(run_file, key, text, value):
    section, name = key.split(".")
    by_override = load_run_config(run_file, [f"{key}={text}"])
    run_file.write_text(RUN.replace("{steps: 1000, ", "{").replace("training:", "training.steps: 1000\ntraining:"))
    run_file.write_text(re.sub(f"{re.escape(key)}: .*\n", "", run_file.read_text()) + f"{key}: {text}\n")
    by_file = load_run_config(run_file)
    assert getattr(getattr(by_override, section), name) == getattr(getattr(by_file, section), name) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=10:00", "training.steps must be a whole number, not '10:00'"),
        ("training.steps=1_000", "training.steps must be a whole number, not '1_000'; write 1000"),
        ("optim.lr=1_0.5", "optim.lr must be a number, not '1_0.5'; write 10.5"),
        ("name=0123", "name must be text, not 123; put it in quotes"),
        ("model.mup=[" + "[" * 99, "nested deeper than 32 levels"),
        (".".join("a" * 5000) + "=1", "the key a.a.a... is nested deeper than 32 levels"),
    ],
)
def test_what_yaml_1_2_reads_as_text_is_said(run_file, override, message):
    assert message in failure(run_file, override)


def test_override_reaches_into_a_preset_list(run_file):
    levels = load_run_config(run_file, ["model.cms.levels.1.hidden_size=64"]).model.cms.levels
    assert [level.hidden_size for level in levels] == [256, 64]
    assert levels[1].update_period_steps == 4


def test_model_override_replaces_the_model(run_file):
    run = load_run_config(run_file, ["model.memory.chunk_tokens=16", "model=hope_60m", "model.norm_epsilon=1e-5"])
    assert run.model == load_model_config("hope_60m", ["norm_epsilon=1e-5"])


def test_preset_override_keeps_the_files_changes(run_file):
    model = load_run_config(run_file, ["model.preset=hope_60m"]).model
    assert (model.name, model.vocab_size) == ("hope_60m (changed)", 8192)


def test_dotted_keys_in_a_file(run_file):
    run_file.write_text(RUN.replace("vocab_size: 8192", "memory.chunk_tokens: 16"))
    assert load_run_config(run_file).model.memory.chunk_tokens == 16


def test_preset_may_name_a_preset(tmp_path, run_file):
    (tmp_path / "mine.yaml").write_text("preset: hope_tiny\nname: mine\nnum_layers: 2\n")
    model = load_run_config(run_file, [f"model={tmp_path}/mine.yaml"]).model
    assert (model.name, model.num_layers, model.hidden_size) == ("mine", 2, 256)


def test_presets_in_a_circle_are_refused(tmp_path, run_file):
    (tmp_path / "a.yaml").write_text(f"preset: {tmp_path}/b.yaml\n")
    (tmp_path / "b.yaml").write_text(f"preset: {tmp_path}/a.yaml\n")
    assert "circle" in failure(run_file, f"model={tmp_path}/a.yaml")


def test_data_paths_become_absolute(run_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = load_run_config(run_file, ["data.heldout=~/heldout"]).data
    assert data.train == tmp_path / "shards/train"
    assert data.heldout == Path.home() / "heldout"


def test_dump_loads_back_equal(run_file, tmp_path):
    run = load_run_config(run_file, ["optim.eps=1e-12", "data.seed=3", "tracking.uri=sqlite:///a.db"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(run))
    assert load_run_config(again) == run


@pytest.mark.parametrize("name", config_names("models"))
def test_model_presets_load_and_dump(name, tmp_path):
    model = load_model_config(name)
    assert model.name == name
    (tmp_path / "m.yaml").write_text(dump_config(model))
    assert load_model_config(tmp_path / "m.yaml") == model


@pytest.mark.parametrize("name", config_names("runs"))
def test_run_files_load_and_open_with_what_they_are_for(name):
    path = Path(__file__).parents[3] / "configs/runs" / f"{name}.yaml"
    assert load_run_config(name) == load_run_config(path)
    head = path.read_text().split("\nname:")[0]
    assert all(word in head for word in ("Hardware:", "xpected", "hope train")) or "torchrun" in head


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.steps=many", "training.steps must be a whole number, not 'many'"),
        ("training.steps='100'", "training.steps must be a whole number, not '100'"),
        ("training.steps=1.5", "training.steps must be a whole number, not 1.5"),
        ("training.steps=true", "training.steps must be a whole number, not true"),
        ("training.steps=0", "training.steps must be greater than 0, not 0"),
        ("training.steps=", "training.steps must be a whole number, not null"),
        ("checkpoint.every=-1", "checkpoint.every must be greater than 0, not -1"),
        ("optim.warmup_steps=-1", "optim.warmup_steps must be at least 0, not -1"),
        ("optim.momentum=1", "optim.momentum must be less than 1, not 1"),
        ("optim.min_lr_ratio=2", "optim.min_lr_ratio must be at most 1, not 2"),
        ("optim.lr=fast", "optim.lr must be a number, not 'fast'"),
        (
            "optim.name=m4",
            "optim.name must be 'm3', 'muon', 'adamuon', 'adamw', 'sgd', 'dgd', 'delta_momentum' or 'dmgd', "
            "not 'm4'; did you mean m3?",
        ),
        ("parallel.zero_stage=4", "parallel.zero_stage must be 0, 1, 2 or 3, not 4"),
        ("tracking.mlflow=1", "tracking.mlflow must be true or false, not 1"),
        ("tracking.mlflow=no", "tracking.mlflow must be true or false, not 'no'"),
        ("data.train=3", "data.train must be text, not 3"),
        ("training=7", "training must be a section with keys of its own, not 7"),
        ("optim.betas=[0.9]", "optim.betas.1 is required"),
        ("model.cms.levels=[]", "model.cms.levels must be a list of at least 1 items, not []"),
        ("model.cms.levels=[{hidden_size: 0}]", "model.cms.levels.0.hidden_size must be greater than 0, not 0"),
        ("name=a b", "name must be text that matches"),
    ],
)
def test_wrong_value_is_one_line_with_its_source(run_file, override, expected):
    message = failure(run_file, override)
    assert message.startswith(f"override {override}: {expected}")
    assert "\n" not in message


def test_mistake_in_a_file_names_the_file(run_file):
    run_file.write_text(RUN.replace("steps: 1000", "steps: soon"))
    assert failure(run_file).startswith(f"{run_file}: training.steps must be a whole number, not 'soon'")


def test_mistake_in_a_preset_names_the_preset(run_file, tmp_path):
    (tmp_path / "bad.yaml").write_text("preset: hope_tiny\nnum_heads: none\n")
    message = failure(run_file, f"model={tmp_path}/bad.yaml")
    assert message.startswith(f"{tmp_path}/bad.yaml: model.num_heads must be a whole number")


def test_missing_key_says_what_it_is(run_file):
    run_file.write_text(RUN.replace("steps: 1000, ", ""))
    assert failure(run_file) == f"{run_file}: training.steps is required (Optimizer steps of the whole run)"


def test_validators_speak_verbatim(run_file):
    message = failure(run_file, "model.hidden_size=255")
    assert message == "model.hidden_size=255 is not divisible by num_heads=4; set head_size or change one"


def test_all_mistakes_are_listed(run_file):
    message = failure(run_file, "training.steps=0", "optim.nam=m3", "model.memory.self_chunk_tokens=33")
    assert message.startswith("3 mistakes in the configuration:\n  - ")
    assert "did you mean optim.name?" in message
    assert "memory.chunk_tokens=32 and memory.self_chunk_tokens=33: one must divide the other" in message
    assert "override training.steps=0: training.steps must be greater than 0" in message


@pytest.mark.parametrize(
    ("overrides", "value"),
    [
        (["parallel.tensor_parallel=3"], "model.num_heads=4"),
        (["parallel.zero_stage=0"], "precision=bf16"),
        (["checkpoint.keep_best=1", "data.heldout=null"], "needs held-out data"),
        (["checkpoint.keep_best=1", "data.heldout=held", "training.eval_every=7"], "checkpoint.keep_best=1"),
        (["training.seq_length=100"], "training.seq_length=100"),
        (["parallel.tensor_parallel=2", "parallel.sequence_parallel=true", "training.seq_length=15"], "=15"),
    ],
)
def test_impossible_combinations_name_value_and_remedy(run_file, overrides, value):
    message = failure(run_file, *overrides)
    assert value in message
    assert any(remedy in message for remedy in ("change", "set", "use"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.steps", "not of the form key.sub=value"),
        ("=3", "not of the form key.sub=value"),
        ("training..steps=3", "not of the form key.sub=value"),
        ("training.steps=[1", "override training.steps=[1, line 1"),
        ("training.steps.more=3", "training.steps is 1000, which has no key 'more'"),
        ("model.cms.levels.2.hidden_size=3", "model.cms.levels is a list of 2; use an index from 0 to 1, not '2'"),
        ("model.cms.levels.first=3", "use an index from 0 to 1, not 'first'"),
        ("model=hope_tinny", "did you mean hope_tiny?"),
        ("model.preset=3", "model.preset must be the name of a preset or a path"),
    ],
)
def test_bad_overrides(run_file, override, expected):
    assert expected in failure(run_file, override)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"- 1\n", "the file is a list"),
        (b"name: \xff\n", "not UTF-8 at byte 6"),
        (b"name: [\n", "line 2"),
        (b"name: a\nname: b\n", "line 2, column 1: key 'name' is given twice"),
        (b"memory.chunk_tokens: 1\nmemory: {chunk_tokens: 2}\n", "memory.chunk_tokens is given twice"),
    ],
)
def test_bad_files(tmp_path, content, expected):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert expected in failure(path)
    assert failure(path).startswith(str(path))


def test_unreadable_file(tmp_path):
    (tmp_path / "directory.yaml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_mapping(tmp_path / "directory.yaml")
    with pytest.raises(ConfigError, match=r"no configuration file .*nowhere\.yaml"):
        load_run_config(tmp_path / "nowhere.yaml")


def test_presets_here_come_first(tmp_path, monkeypatch):
    (tmp_path / "configs/models").mkdir(parents=True)
    (tmp_path / "configs/models/hope_tiny.yaml").write_text("preset: hope_60m\nname: here\n")
    monkeypatch.chdir(tmp_path)
    assert load_model_config("hope_tiny").name == "here"


def test_configs_are_frozen(run_file):
    run = load_run_config(run_file)
    with pytest.raises(ValueError, match="frozen"):
        run.training.steps = 3  # type: ignore[misc]


def test_mappings_resolve_like_files(run_file):
    data = read_mapping(run_file)
    resolved = resolve_run_config(data, ["training.steps=700"], source="here")
    assert isinstance(resolved, RunConfig)
    assert resolved == load_run_config(run_file, ["training.steps=700"])
    assert data["model"] == {"preset": "hope_tiny", "vocab_size": 8192}  # the caller's mapping is left alone


MIX = "data.mix_with={code: shards/code}"


def test_a_mixture_of_data_sets_has_weights_by_name_and_absolute_paths(run_file: Path) -> None:
    weights = "data.mix_schedule=[{weights: {train: 0.8, code: 0.2}}, {from_tokens: 1000000, weights: {code: 1}}]"
    config = load_run_config(run_file, [MIX, weights])
    assert config.data.mix_with["code"].is_absolute()
    assert [phase.from_tokens for phase in config.data.mix_schedule] == [0, 1_000_000]
    assert resolve_run_config(read_mapping_of(dump_config(config), run_file), source="dump") == config


def read_mapping_of(text: str, beside: Path) -> dict:
    path = beside.with_name("dumped.yaml")
    path.write_text(text)
    return read_mapping(path)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([MIX], "belong together"),
        (["data.mix_schedule=[{weights: {train: 1}}]"], "belong together"),
        (["data.mix_with={train: x}", "data.mix_schedule=[{weights: {train: 1}}]"], "another name"),
        ([MIX, "data.mix_schedule=[{weights: {train: 1, cod: 1}}]"], "'cod'"),
        ([MIX, "data.mix_schedule=[{weights: {train: 1}}]"], "never gives 'code'"),
        ([MIX, "data.mix_schedule=[{weights: {train: 1, code: -1}}]"], "at least 0"),
        ([MIX, "data.mix_schedule=[{weights: {train: 1, code: .inf}}]"], "finite"),
        ([MIX, "data.mix_schedule=[{from_tokens: 5, weights: {train: 1, code: 1}}]"], "begin at from_tokens=0"),
        (["data.on_corrupt=ignore"], "data.on_corrupt"),
        (["data.prefetch_steps=-1"], "data.prefetch_steps"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(run_file: Path, overrides: list[str], said: str) -> None:
    assert said in failure(run_file, *overrides)
