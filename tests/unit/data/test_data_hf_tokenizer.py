"""A Hugging Face tokenizer.json from text to shards and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import Manifest, TokenStream, load_tokenizer
from data_pipeline.errors import TokenizerError
from data_pipeline.inspection import find_tokenizer, verify
from data_pipeline.prepare import prepare

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [f"def function_{i}(x):\n    return x + {i}  # naïve <|endoftext|> 中{i}\n" for i in range(40)]


def write_bpe(path: Path, vocab_size: int = 300, specials: tuple[str, ...] = ("<|endoftext|>",)) -> Path:
    """A byte-level BPE as GPT-2's, with a template that adds an end mark, truncation and padding, all of which are left out."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    end = specials[0]
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 0)])
    bpe.enable_truncation(8)
    bpe.enable_padding(length=8)
    bpe.save(str(path))
    return path


def test_the_ids_are_those_of_the_library_without_marks(tmp_path):
    path = write_bpe(tmp_path / "tokenizer.json")
    ours, theirs = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    theirs.no_truncation()
    theirs.no_padding()
    plain = TEXTS[0].replace("<|endoftext|>", "")
    assert ours.encode(plain).tolist() == theirs.encode(plain, add_special_tokens=False).ids
    assert ours.encode(TEXTS[0]).tolist().count(ours.eos_id) == 0, "the name of a special token in a text is text"
    assert ours.is_exact and all(ours.decode(ours.encode(text)) == text for text in TEXTS)
    assert ours.decode([*ours.encode("ab"), ours.eos_id]) == "ab"
    assert ours.vocab_size == 300 and ours.special_ids == {"unk": -1, "bos": -1, "eos": 0, "pad": 0}
    with pytest.raises(TokenizerError, match="token id 300 is outside"):
        ours.decode([300])


def test_shards_carry_the_file_and_train(tmp_path):
    path = write_bpe(tmp_path / "tokenizer.json")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for workers in (1, 2):
        prepare([tmp_path / "text.jsonl"], path, tmp_path / f"data{workers}", held_out_fraction=0.2, workers=workers)
    manifest = Manifest.load(tmp_path / "data1/train")
    assert manifest.digest == Manifest.load(tmp_path / "data2/train").digest
    assert (tmp_path / "data1/tokenizer.json").read_bytes() == path.read_bytes()
    tokenizer = find_tokenizer(manifest)
    assert tokenizer.digest == manifest.tokenizer_sha256 and manifest.eos_id == 0
    assert verify(manifest, tokenizer).problems == []
    sample = TokenStream(tmp_path / "data1/train", seq_length=64, seed=1).sample(0)
    assert np.count_nonzero(sample == 0) >= 1 and "function_" in tokenizer.decode(sample[sample > 0])


def test_special_tokens_come_from_the_config_beside(tmp_path):
    path = write_bpe(tmp_path / "tokenizer.json", specials=("<<end>>", "<<begin>>"))
    with pytest.raises(TokenizerError, match=r"names no end mark.*tokenizer_config.json"):
        load_tokenizer(path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "<<end>>"}, "bos_token": "<<begin>>"}))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (0, 1)
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy/tokenizer.json")
    assert load_tokenizer(tmp_path / "copy/tokenizer.json").special_ids == tokenizer.special_ids
    config.write_text(json.dumps({"eos_token": "<none>"}))
    with pytest.raises(TokenizerError, match="eos_token='<none>', which is no token"):
        load_tokenizer(path)


@pytest.mark.parametrize("content", ["{}", '{"model": 3}', "{"])
def test_another_json_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"x.json is not a tokenizer.json"):
        load_tokenizer(tmp_path / "x.json")
