"""A Llama checkpoint as Hope-Attention computes what transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from hope_megatron.checkpoint.errors import ConversionError, ExportCheckError
from hope_megatron.checkpoint.find import find_checkpoint
from hope_megatron.checkpoint.local_model import build_local_model
from hope_megatron.cli.main import main
from hope_megatron.config import CMSConfig, CMSLevelConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from hope_megatron.config.load import override_inner_clocks
from hope_megatron.convert.begin_run import begin_run
from hope_megatron.convert.llama import check_against_transformers, import_llama, llama_model_config, split_mlp
from hope_megatron.eval.perplexity import score_heldout
from hope_megatron.model.in_context import set_inner_clocks

transformers = pytest.importorskip("transformers", reason="the source models are made with transformers")

SIZES = {
    "vocab_size": 151,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
VARIANTS = {
    "llama": (transformers.LlamaConfig, {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "grouped, tied, wide heads": (
        transformers.LlamaConfig,
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 16},
    ),
    "rope base": (
        transformers.LlamaConfig,
        # transformers 4 reads the first name, 5 the second
        {
            "num_key_value_heads": 1,
            "rope_theta": 777.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
        },
    ),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2, "sliding_window": 5, "use_sliding_window": False}),
    "qwen2, window": (
        transformers.Qwen2Config,
        {"num_key_value_heads": 2, "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0},
    ),
    "qwen3": (transformers.Qwen3Config, {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, {"num_key_value_heads": 2, "sliding_window": 9}),
}
BEGINNING = {"progress": {"step": 0}, "data": {"sample": 0}, "provenance": {"commit": None, "versions": {}}}


def make_source(directory: Path, name: str = "llama", **changes) -> nn.Module:
    """A small model of random weights, norms and biases too."""
    kind, values = VARIANTS[name]
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(kind(**{**SIZES, **values, **changes})).eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(directory, max_shard_size="100KB")
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_the_sources(tmp_path: Path, name: str) -> None:
    source = make_source(tmp_path / "llama", name)
    model = import_llama(tmp_path / "llama", llama_model_config(tmp_path / "llama"))
    tokens = torch.randint(SIZES["vocab_size"], (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = source(tokens).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_mlp_cut_into_levels_computes_the_same(tmp_path: Path, name: str) -> None:
    make_source(tmp_path / "source", name)
    whole = import_llama(tmp_path / "source", llama_model_config(tmp_path / "source"))
    command = ["import", "llama", str(tmp_path / "source"), "--model", str(tmp_path / "model.yaml")]
    assert main([*command, "--split-mlp", "48,24,8"]) == 0
    text = json.dumps(yaml.safe_load((tmp_path / "model.yaml").read_text())["model"])
    config = ModelConfig.model_validate_json(text)
    assert [level.hidden_size for level in config.cms.levels] == [48, 24, 8]
    model = import_llama(tmp_path / "source", config)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, whole(tokens).logits, atol=1e-5, rtol=1e-6)
    with pytest.raises(ConversionError, match="48, 24 hidden channels add up to 72; the MLP has 80"):
        split_mlp(llama_model_config(tmp_path / "source"), (48, 24))


def test_levels_added_to_the_chain_are_neutral_at_first_and_learn(tmp_path: Path) -> None:
    make_source(tmp_path / "llama")
    config = llama_model_config(tmp_path / "llama")
    levels = (*config.cms.levels, CMSLevelConfig(hidden_size=32, update_period_steps=4), CMSLevelConfig(hidden_size=16))
    model = import_llama(tmp_path / "llama", config.model_copy(update={"cms": CMSConfig(levels=levels)}))
    assert check_against_transformers(model, tmp_path / "llama") <= 1e-4
    tokens = torch.randint(SIZES["vocab_size"], (1, 16))
    model(tokens, tokens).losses.sum().backward()
    assert all(layer.mlp.levels[i].down.weight.grad.abs().sum() > 0 for layer in model.layers for i in (1, 2))


def test_it_learns_in_context_without_retraining(tmp_path: Path) -> None:
    """Seven tokens over and over, read as one stream: with a clock on its MLPs the imported model's loss falls."""
    make_source(tmp_path / "llama", initializer_range=0.05)
    model = import_llama(tmp_path / "llama", llama_model_config(tmp_path / "llama")).eval().requires_grad_(False)
    tokens = np.tile(np.arange(7), 30)
    options = dict(context_tokens=None, window_tokens=48, batch_size=1)
    static = score_heldout(model, tokens, **options)
    clocks = ["cms.levels.0.inner_chunk_tokens=8", "cms.levels.0.inner_rate=0.02"]
    set_inner_clocks(model, override_inner_clocks(model.model_config, clocks))
    learning = score_heldout(model, tokens, learn=True, **options)
    assert abs(learning[:8] - static[:8]).max() < 1e-5
    assert learning[-50:].mean() < 0.8 * static[-50:].mean()


def test_a_run_starts_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_source(tmp_path / "llama")
    assert main(["import", "llama", str(tmp_path / "llama"), "--model", str(tmp_path / "model.yaml")]) == 0
    model = ModelConfig.model_validate_json(json.dumps(yaml.safe_load((tmp_path / "model.yaml").read_text())["model"]))
    config = RunConfig(
        name="run",
        output_dir=tmp_path,
        model=model,
        training=TrainingConfig(steps=1000, seq_length=16, global_batch_size=2),
        data=DataConfig(train=tmp_path, tokenizer=tmp_path),
    )
    begin_run(tmp_path / "llama", "llama", config, BEGINNING)
    found = find_checkpoint(str(config.run_dir))
    restored = build_local_model(found.config.model, found.tensors(), "the run")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(restored(tokens).logits, source(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "type 'linear'"),
    ],
)
def test_what_has_no_counterpart_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    make_source(tmp_path / "llama", **changes)
    with pytest.raises(ConversionError, match=message):
        llama_model_config(tmp_path / "llama")


def test_other_models_are_refused(tmp_path: Path) -> None:
    make_source(tmp_path / "llama")
    config = llama_model_config(tmp_path / "llama")
    with pytest.raises(ConversionError, match=r"model\.num_layers: 3 there, 2 in the run\n.*--model FILE"):
        import_llama(tmp_path / "llama", config.model_copy(update={"num_layers": 2}))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ConversionError, match="is of GPT2LMHeadModel"):
        llama_model_config(tmp_path)


def test_a_wrong_import_is_found(tmp_path: Path) -> None:
    make_source(tmp_path / "llama")
    model = import_llama(tmp_path / "llama", llama_model_config(tmp_path / "llama"))
    model.layers[1].mlp.levels[0].down.weight.data[0, 0] += 0.5
    with pytest.raises(ExportCheckError, match="logits differ"):
        check_against_transformers(model, tmp_path / "llama")
