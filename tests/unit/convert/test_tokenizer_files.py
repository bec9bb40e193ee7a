"""Whatever SentencePiece model was trained with: the tokenizer of an export gives its ids, or SentencePiece itself runs."""

from __future__ import annotations

import io
import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.tokenizer import Tokenizer
from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.convert.huggingface.tokenizer_back import read_tokenizer
from hope_megatron.convert.huggingface.tokenizer_files import FAST, SLOW, write_tokenizer

transformers = pytest.importorskip("transformers", reason="the files are for transformers")

LINES = [
    line
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[ab]*.py"))
    for line in path.read_text().split("\n")
]
EXACT = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "pad_id": 3,
}
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "ours": ({}, FAST),
    "llama: a space before the text, no pad piece": ({"add_dummy_prefix": True, "pad_id": -1}, FAST),
    "symbols": ({"user_defined_symbols": ["<tag>", "self.", "é"]}, FAST),
    "control symbols": ({"control_symbols": ["<ctl>"]}, FAST),
    "symbols with spaces": ({"user_defined_symbols": ["a b", "  "]}, SLOW),
    "symbols that overlap with </s>": ({"user_defined_symbols": ["s>"]}, SLOW),
    "symbols and a space before the text": ({"add_dummy_prefix": True, "user_defined_symbols": ["<tag>"]}, SLOW),
    "unigram": ({"model_type": "unigram"}, SLOW),
    "NFKC": ({"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": True}, SLOW),
    "runs of spaces removed": ({"remove_extra_whitespaces": True, "add_dummy_prefix": True}, SLOW),
    "no bytes": ({"byte_fallback": False}, SLOW),
    "spaces as suffixes": ({"treat_whitespace_as_suffix": True, "add_dummy_prefix": True}, SLOW),
}
TEXTS = [
    "",
    " ",
    "  a",
    "a  ",
    "</s><unk> <s><pad><ctl></s>>",
    "<tag> self.x <tag>self.self. a b  é",
    "a\n\tB \u2581 e\u0301\ufb01\u2460 中😀\x00\r\n 12  ",
    "def f(x):\n    return x  # </s>\n",
]


def train(**changes: Any) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=500, minloglevel=2, **(EXACT | changes)
    )
    return Tokenizer(model.getvalue())


def same_ids(tokenizer: Any, processor: Any, text: str) -> bool:
    return tokenizer(text, add_special_tokens=False)["input_ids"] == processor.encode(text)


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_sentencepiece(name: str, tmp_path: Path) -> None:
    changes, expected = MODELS[name]
    tokenizer = train(**changes)
    files = tmp_path / "files"
    files.mkdir()
    assert write_tokenizer(files, tokenizer) == expected
    assert (files / "tokenizer.json").exists() == (expected == FAST)
    loaded = transformers.AutoTokenizer.from_pretrained(files, trust_remote_code=expected == SLOW)
    processor = tokenizer._processor
    for text in TEXTS:
        assert same_ids(loaded, processor, text), text
        ids = processor.encode(text)
        assert loaded.decode(ids) == processor.decode(ids)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    batch = loaded(["a b", "a b c d e f"], padding=True)
    assert batch.keys() == {"input_ids", "attention_mask"} and len(batch["input_ids"][0]) == len(batch["input_ids"][1])
    chat = [{"role": "user", "content": "Hi"}]
    assert loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == "User: Hi\nAssistant:"
    # saved by transformers, with what SentencePiece needs, and read again
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=expected == SLOW)
    assert all(same_ids(again, processor, text) for text in TEXTS)
    # and back into a SentencePiece model, with what was added
    back = Tokenizer(read_tokenizer(tmp_path / "again"))
    assert (back.eos_id, back.bos_id, back.pad_id) == (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id)
    assert back.is_exact == tokenizer.is_exact
    assert all(back._processor.encode(text) == processor.encode(text) for text in TEXTS)
    again.add_tokens(["<|user|>"])
    again.add_tokens(["<|end|>"], special_tokens=True)
    again.save_pretrained(tmp_path / "chat")
    if expected == FAST and changes.get("add_dummy_prefix"):
        with pytest.raises(ConversionError, match="puts a space before a text"):
            read_tokenizer(tmp_path / "chat")
        return
    chat = Tokenizer(read_tokenizer(tmp_path / "chat"))
    assert chat.vocab_size == len(again) == tokenizer.vocab_size + 2
    for text in ("def <|user|>f(x) <|user|></s><|end|>", "<|user|>a", *TEXTS):
        assert same_ids(again, chat._processor, text), text
    assert chat._processor.is_control(chat.vocab_size - 1)


@pytest.mark.parametrize("name", [name for name, (_, kind) in MODELS.items() if kind == FAST])
def test_a_fast_tokenizer_agrees_on_any_text(name: str, tmp_path: Path) -> None:
    tokenizer = train(**MODELS[name][0])
    write_tokenizer(tmp_path, tokenizer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), split_special_tokens=True
    )
    parts = st.sampled_from(
        ["<tag>", "self.", "</s>", "<unk>", "<", ">", "é", "e", " ", "  ", "\n", "a", "\u2581", "中"]
    )

    @settings(deadline=None, max_examples=200)
    @given(st.lists(parts | st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=8).map("".join))
    def check(text: str) -> None:
        assert same_ids(fast, tokenizer._processor, text)

    check()


def test_a_special_token_without_a_piece_is_not_named(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, train(bos_id=-1))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "bos_token" not in config and config["eos_token"] == "</s>"
