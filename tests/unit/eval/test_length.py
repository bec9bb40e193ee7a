"""`hope eval length`: a text far beyond the trained length, and needles at chosen depths."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hope_megatron.cli import eval_length
from hope_megatron.cli.main import main
from hope_megatron.eval.length import read_far
from hope_megatron.eval.perplexity import EvaluationError, score_heldout
from hope_megatron.suites.needle_questions import NEEDLES
from hope_megatron.suites.needle_reach import DEPTHS, asked_lengths, haystack_tokens
from hope_megatron.suites.needle_text import haystack


def test_stretches_double_and_lose_what_one_stream_loses(opened) -> None:
    tokens = np.random.default_rng(0).integers(0, opened.tokenizer.vocab_size, 113)
    told: list[int] = []
    stretches = read_far(opened.model, tokens, 16, lambda stretch: told.append(stretch.stop))
    assert [(s.start, s.stop) for s in stretches] == [(0, 16), (16, 32), (32, 64), (64, 112)]
    assert told == [16, 32, 64, 112]
    losses = score_heldout(opened.model, tokens, context_tokens=112, window_tokens=7, batch_size=1)
    for stretch in stretches:
        assert stretch.loss == pytest.approx(losses[stretch.start : stretch.stop].mean(), rel=1e-5)
        assert stretch.seconds_per_token > 0 and "layer 1 mem" in stretch.drift and min(stretch.drift.values()) > 0
    assert len({stretch.state_bytes for stretch in stretches}) == 1, "whole chunks leave states of one size"
    with pytest.raises(EvaluationError, match="at least 2"):
        read_far(opened.model, tokens[:1], 16)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_lies_where_it_is_put(depth: float) -> None:
    def encode(text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    question = NEEDLES["number"](np.random.default_rng(1))
    batch = haystack(question, 600, encode("hay "), encode, np.random.default_rng(2), depth=depth)
    read = bytes(batch.tokens[0].astype(np.uint8)).decode()
    room = 601 - sum(len(text) for text in (question.needles[0], question.question, question.answer))
    assert read.index(question.needles[0]) == round(depth * room)


def test_the_last_value_is_that_of_the_last_needle_of_its_name() -> None:
    for seed in range(20):
        question = NEEDLES["last value"](np.random.default_rng(seed))
        name = question.question.split()[6]
        of_name = [needle for needle in question.needles if f" {name} " in needle]
        assert len(of_name) == 2 and question.answer in of_name[1] and len(question.needles) == 4


def test_the_command_prints_draws_and_writes(opened, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(eval_length, "open_model", lambda *_: opened)
    (tmp_path / "text.txt").write_text(
        "".join(f"def function_{i}(argument):\n    return argument\n" for i in range(200))
    )
    files = ["--json", str(tmp_path / "r.json"), "--png", str(tmp_path / "r.png"), "--markdown", str(tmp_path / "r.md")]
    command = ["eval", "length", "tiny", "--text", str(tmp_path / "text.txt")]
    assert main([*command, "--tokens", "1K", "--needles", "number", "--samples", "1", *files]) == 0
    printed = capsys.readouterr().out
    assert "100.0 %  number in 1,024 tokens, 0s left" in printed and "nats gained" in printed
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["text"][-1]["stop"] == 1024 and result["trained_tokens"] == 16
    assert [row["depth"] for row in result["needles"]] == [None, *DEPTHS]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG") and "at 50%" in (tmp_path / "r.md").read_text()

    assert main([*command, "--needles", "none"]) == 0
    assert "needle" not in capsys.readouterr().out
    for arguments, words in (
        (["--tokens", "1M"], "ask for fewer, or give more"),
        (["--needles", "none", "number"], "none, or kinds"),
        (["--samples", "0"], "at least 1"),
    ):
        assert main([*command, *arguments]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--tokens", "1.5G"])
    assert "no number of tokens such as 65536, 64K or 1M" in capsys.readouterr().err


def test_lengths_step_by_four() -> None:
    assert asked_lengths(1 << 20) == (1024, 4096, 16384, 65536, 262144, 1048576)
    assert asked_lengths(600) == (600,)
    assert haystack_tokens((100, 400), ("number", "multi-key"), 3) == (7 + 2) * 3 * 500
