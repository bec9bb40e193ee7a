"""A text's way through the memories: the same in any windows, with losses where they belong, and drawn."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from hope_megatron.cli import eval_memory
from hope_megatron.cli.main import main
from hope_megatron.config import ParallelConfig
from hope_megatron.eval.memory_text import read_text
from hope_megatron.eval.perplexity import EvaluationError, score_heldout
from hope_megatron.model import build_model
from hope_megatron.parallel.distributed import init_distributed
from hope_megatron.testing.models import tiny_model

TOKENS = np.random.default_rng(0).integers(0, 300, size=53)


def test_windows_change_nothing(opened):
    whole, cut = (read_text(opened.model, TOKENS, window) for window in (64, 13))
    np.testing.assert_allclose(cut.losses[1:], whole.losses[1:], rtol=1e-4)
    for a, b in zip(whole.layers, cut.layers):
        assert a.surprise.shape == (5, 53)
        for name in ("eta", "retention", "surprise"):
            np.testing.assert_allclose(getattr(b, name), getattr(a, name), rtol=1e-3)
        np.testing.assert_allclose(b.drift[:, -1], a.drift[:, -1], rtol=1e-3)
        assert a.ends.tolist() == [8, 16, 24, 32, 40, 48, 53]


def test_losses_stand_at_the_token_that_was_hard_to_guess(opened):
    health = read_text(opened.model, TOKENS, 64)
    expected = score_heldout(opened.model, TOKENS, context_tokens=None, window_tokens=64, batch_size=1)
    assert np.isnan(health.losses[0])
    np.testing.assert_allclose(health.losses[1:], expected, rtol=1e-5)


def test_the_model_is_left_as_it_was(opened):
    tokens = torch.from_numpy(TOKENS).unsqueeze(0)
    before = opened.model(tokens).logits
    read_text(opened.model, TOKENS, 16)
    assert all(layer.mixer.observer is None for layer in opened.model.layers)
    assert torch.equal(opened.model(tokens).logits, before)


def test_surprise_is_comparable_between_memories(opened):
    health = read_text(opened.model, TOKENS, 64)
    for layer in health.layers:
        scores = layer.standardized_surprise(reach=64)
        np.testing.assert_allclose(scores.mean(axis=1), 0, atol=1e-9)
        np.testing.assert_allclose(scores.std(axis=1), 1, atol=1e-9)
        near = layer.standardized_surprise(reach=5)[2, 20]
        around = layer.surprise[2, 15:26]
        assert near == pytest.approx((layer.surprise[2, 20] - around.mean()) / around.std())
    top = health.most_surprising(4)
    means = health.surprise().mean(axis=0)
    assert sorted(means[top], reverse=True) == sorted(means, reverse=True)[:4]


def test_a_model_of_attention_has_no_memories():
    init_distributed(ParallelConfig())
    with pytest.raises(EvaluationError, match="no memories"):
        read_text(build_model(tiny_model(layer_pattern=("attention",))), TOKENS % 61, 64)


def test_command_draws_and_prints(opened, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_memory, "open_model", lambda *_: opened)
    files = ["--json", str(tmp_path / "m.json"), "--png", str(tmp_path / "m.png")]
    assert main(["eval", "memory", "tiny", "--text", str(text_file), "--max-tokens", "60", "--top", "5", *files]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == 10 + 5 + 2  # five memories in two layers, five tokens, two headers
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    result = json.loads((tmp_path / "m.json").read_text())
    assert len(result["tokens"]) == len(result["losses"]) == len(result["layers"][1]["surprise"]["mem"]) == 60
    assert result["losses"][0] is None and result["memories"] == ["mem", "k", "v", "eta", "alpha"]


@pytest.mark.parametrize(
    ("checkpoint", "directory"),
    [("run/checkpoints/step-00000001", "run"), ("lone/step-00000001", "lone"), (None, "export")],
)
def test_files_go_beside_the_model(opened, text_file, tmp_path, monkeypatch, checkpoint, directory):
    (tmp_path / directory).mkdir()
    found = dataclasses.replace(
        opened, name=str(tmp_path / "export"), checkpoint=None if checkpoint is None else tmp_path / checkpoint
    )
    monkeypatch.setattr(eval_memory, "open_model", lambda *_: found)
    monkeypatch.chdir(text_file.parent)
    before = sorted(text_file.parent.iterdir())
    assert main(["eval", "memory", "tiny", "--text", str(text_file), "--max-tokens", "60"]) == 0
    assert sorted(path.name for path in (tmp_path / directory).iterdir()) == ["memory.json", "memory.png"]
    assert sorted(text_file.parent.iterdir()) == before


def test_tokens_are_shown_with_what_stands_before(opened):
    ids = opened.tokenizer.encode("def function_1(argument)\n    return").tolist()
    health = read_text(opened.model, np.array([opened.tokenizer.eos_id, *ids]), 64)
    assert eval_memory._shown(opened, health, 0, before=6) == "(end of document)"
    shown = [eval_memory._shown(opened, health, i, before=0) for i in range(1, len(ids) + 1)]
    assert "".join(shown).replace("␣", " ").replace("⏎", "\n") == "def function_1(argument)\n    return"
    last = eval_memory._shown(opened, dataclasses.replace(health), len(ids), before=50)
    assert last.startswith("def function_1(argument)⏎") and last.endswith("]")
