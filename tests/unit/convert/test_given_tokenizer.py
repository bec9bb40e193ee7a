"""The export of a model whose data was made with a tokenizer.json carries that file, and transformers gives its ids."""

from __future__ import annotations

import json
import math

import pytest
import torch

from data_pipeline import Tokenizer
from data_pipeline.open_tokenizer import load_tokenizer, make_tokenizer
from hope_megatron.cli.main import main
from hope_megatron.convert.huggingface.tokenizer_back import read_tokenizer
from hope_megatron.convert.open_model import open_model

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture
def bpe(tmp_path) -> Tokenizer:
    """300 ids, as many as the fixture's model has."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([f"a text of some {i} words and words again\n" for i in range(300)], trainer)
    library.save(str(tmp_path / "bpe.json"))
    return load_tokenizer(tmp_path / "bpe.json")


def test_export_generation_and_the_way_back(make_checkpoint, bpe, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    source, out = make_checkpoint(), tmp_path / "out"
    assert main(["export", "hf", str(source.path), str(out), "--tokenizer", str(tmp_path / "bpe.json")]) == 0
    assert (out / "tokenizer.json").read_bytes() == bpe.model and not (out / "tokenizer.model").exists()
    opened = open_model(str(out))
    assert opened.tokenizer.digest == bpe.digest and opened.tokenizer.eos_id == bpe.eos_id
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    text = "some words <|endoftext|> again\n"
    assert theirs(text)["input_ids"] == bpe.encode(text).tolist() and theirs.eos_token == "<|endoftext|>"
    assert "byte for byte" in (out / "README.md").read_text()
    capsys.readouterr()
    assert main(["generate", str(out), "--prompt", "some words", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip()
    again = tmp_path / "again"
    theirs.save_pretrained(again)  # as after fine-tuning
    saved = make_tokenizer(read_tokenizer(again), "again", again / "tokenizer.json")
    assert saved.encode(text).tolist() == bpe.encode(text).tolist() and saved.special_ids == bpe.special_ids
    assert main(["import", "hf", str(out), "--tokenizer", str(tmp_path / "back.json")]) == 0
    assert load_tokenizer(tmp_path / "back.json").digest == bpe.digest


def test_evaluation_is_what_transformers_makes_of_the_same_ids(make_checkpoint, bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    out, text = tmp_path / "out", "some words again and 17 more, naïve 中\n" * 3
    command = ["export", "hf", str(make_checkpoint().path), str(out), "--tokenizer", str(tmp_path / "bpe.json")]
    assert main(command) == 0
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    files = ["--text", str(tmp_path / "text.txt"), "--json", str(tmp_path / "result.json")]
    assert main(["eval", str(out), *files, "--context", "stream", "--batch-size", "1"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    end = tokenizer.eos_token_id
    ids = torch.tensor([[end, *tokenizer(text)["input_ids"], end]])
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    score, num_targets = result["scores"]["model"], ids.size(1) - 1
    assert result["tokens"] == num_targets and score["loss"] == pytest.approx(loss, rel=1e-5)
    bits = loss * num_targets / math.log(2)
    assert score["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-5)
