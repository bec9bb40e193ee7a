"""What a run gives to Python is what the commands see."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hope_megatron
from data_pipeline.tokenizer import Tokenizer
from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.config.base import ConfigError
from hope_megatron.convert.huggingface.export import export_huggingface
from hope_megatron.model import LanguageModel

pytest.importorskip("transformers", reason="HopeForCausalLM is a transformers model")


def test_a_run_and_its_export_give_the_same(
    make_checkpoint: Callable[..., CheckpointSource], model: LanguageModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = make_checkpoint()
    export_huggingface(source, tmp_path / "exported", tokenizer)
    run = tmp_path / "run"
    weights, again = hope_megatron.load_weights(run), hope_megatron.load_weights(tmp_path / "exported")
    assert weights.keys() == again.keys() == dict(model.named_parameters()).keys()
    for name, tensor in weights.items():
        rows = model.model_config.vocab_size if name == "embedding.weight" else None
        assert tensor.dtype == torch.float32 and torch.equal(tensor[:rows], again[name][:rows])
    tokens = torch.randint(tokenizer.vocab_size, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits
        for reference in (run, tmp_path / "exported"):
            loaded = hope_megatron.load_model(reference)
            torch.testing.assert_close(loaded(tokens).logits, expected, atol=1e-5, rtol=0)
    # one layer of it in someone's own model
    prefix = "layers.1.mixer."
    memory = hope_megatron.NeuralMemory(32, 4, chunk_tokens=8)
    memory.load_state_dict({name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)})


def test_texts_are_continued_each_alone(make_checkpoint: Callable[..., CheckpointSource], tmp_path: Path) -> None:
    make_checkpoint()
    run = hope_megatron.Run(tmp_path / "run")
    prompts = ["def function_1(", "", "    return argument + value"]
    together = hope_megatron.generate(run, prompts, max_new_tokens=8, temperature=0)
    assert together == [hope_megatron.generate(run, prompt, max_new_tokens=8, temperature=0)[0] for prompt in prompts]
    drawn = [hope_megatron.generate(run, prompts, max_new_tokens=8, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert hope_megatron.generate(run, []) == []


def test_scores_are_those_of_the_command(make_checkpoint: Callable[..., CheckpointSource], tmp_path: Path) -> None:
    make_checkpoint()
    text = tmp_path / "text.py"
    text.write_text("def function_1(argument, value=1):\n    return argument + value * 1\n" * 4)
    score = hope_megatron.evaluate(tmp_path / "run", text=[text])
    run = hope_megatron.Run(tmp_path / "run")
    ids = [run.tokenizer.eos_id, *run.tokenizer.encode(text.read_text()).tolist(), run.tokenizer.eos_id]
    tokens, window = torch.tensor(ids), run.window_tokens
    assert score["context_tokens"] == window == 32 and score["tokens"] == len(ids) - 1
    assert score["perplexity"] == pytest.approx(2.718281828 ** score["loss"], rel=1e-5)
    with torch.no_grad():
        first = torch.nn.functional.cross_entropy(run.model(tokens[None, :33][:, :-1]).logits[0], tokens[1:33])
    assert abs(first - score["loss"]) < 0.5, "of one row, and of all"


def test_a_model_from_sizes_begins_at_the_loss_of_guessing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hope_megatron.HopeConfig(
        vocab_size=61,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_sizes=(12,),
        memory={"chunk_tokens": 8},
    )
    model = hope_megatron.HopeForCausalLM(config)
    tokens = torch.randint(61, (2, 9))
    assert model(tokens, labels=tokens).loss.item() == pytest.approx(torch.tensor(61.0).log().item(), abs=0.1)
    assert model.config.architecture["memory"]["chunk_tokens"] == 8
    model.save_pretrained(tmp_path)
    again = hope_megatron.HopeForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again.eval()(tokens).logits, model.eval()(tokens).logits)
    with pytest.raises(ConfigError, match="hidden_size=15 is not divisible by num_heads=2"):
        hope_megatron.HopeConfig(vocab_size=61, hidden_size=15, num_hidden_layers=1, num_attention_heads=2)


def test_every_name_of_the_front_door_is_there() -> None:
    for name in hope_megatron.__all__:
        assert getattr(hope_megatron, name) is not None
    assert set(hope_megatron.__all__) <= set(dir(hope_megatron))
    with pytest.raises(AttributeError, match="it offers ContinuumMLP"):
        hope_megatron.NeuralMemories  # noqa: B018
    assert (Path(hope_megatron.__file__).parent / "py.typed").exists()


def test_without_transformers_the_message_says_what_to_install() -> None:
    code = "import sys; sys.modules['transformers'] = None\nfrom hope_megatron import HopeForCausalLM"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "pip install 'hope_megatron[transformers]'" in done.stderr and done.returncode == 1
