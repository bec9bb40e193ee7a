"""Texts to score: what a file holds is what is scored."""

from __future__ import annotations

from data_pipeline.open_tokenizer import load_tokenizer
from data_pipeline.tokenizer import train_tokenizer
from hope_megatron.eval.heldout import text_tokens


def test_a_byte_order_mark_is_no_text(tmp_path):
    train_tokenizer(["some text to train on, of many words"] * 10, tmp_path / "t.model", 285)
    tokenizer = load_tokenizer(tmp_path / "t.model")
    (tmp_path / "plain.txt").write_bytes(b"some words")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfsome words")
    plain, marked = (text_tokens([tmp_path / name], tokenizer) for name in ("plain.txt", "bom.txt"))
    assert plain.tolist() == marked.tolist() and tokenizer.decode(plain[1:-1]) == "some words"
