from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.corpus import python_stdlib_documents
from data_pipeline.errors import TokenizerError, VocabularyError
from data_pipeline.open_tokenizer import load_tokenizer
from data_pipeline.tokenizer import Tokenizer, _sample_lines, train_tokenizer

TRICKY = [
    "", " ", "  two  spaces  ", "\n\n\t x\r\n", "a\x00b\x00", "\u2581", "\u2581 a \u2581\u2581b ", "a\u2581",
    "<s></s><pad><unk><0x41>", "\u2047 \u2585", "e\u0301 \u00e9", "\ufeffx\u200b", "\ufffd", "0123456789 3.14",
    "\u4e2d\u6587 \U0001f600\U0001f469\u200d\U0001f680", "\x1b[0m\x7f\x85\u2028", "\U0010ffff",
]  # fmt: skip


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def each_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = ["the memory of a model is its past\tand  more\n    indented 2024"] * 20
    return train_tokenizer(texts, tmp_path_factory.mktemp("model") / "m.model", 285, request.param)


@pytest.mark.parametrize("text", TRICKY)
def test_round_trip_of_tricky_text_is_exact(each_tokenizer: Tokenizer, text: str) -> None:
    assert each_tokenizer.decode(each_tokenizer.encode(text)) == text


@given(st.text(st.characters(codec="utf-8")))
def test_round_trip_of_any_text_is_exact(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids.tolist()) & set(tokenizer.special_ids.values())  # text never spells a special token


def test_encoding_is_sentencepieces_own(tokenizer: Tokenizer) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    text = "a sample of the stream begins\n  where 12 caf\u00e9s end"
    assert tokenizer.encode(text).tolist() == processor.encode(text)
    assert tokenizer.encode(text).dtype == np.int64


def test_special_ids_are_fixed_and_decode_to_nothing(tokenizer: Tokenizer) -> None:
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 3)
    assert tokenizer.decode([1, *tokenizer.encode("model"), 2, 3, 3]) == "model"


def test_digits_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("20240131")) == 8


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    texts = ["one text", "another text with more words in it"] * 50
    digests = {train_tokenizer(texts, tmp_path / name, 280).digest for name in ("a", "b")}
    assert len(digests) == 1
    assert load_tokenizer(tmp_path / "a").digest in digests


def test_documents_of_the_standard_library_train_a_tokenizer(tmp_path: Path) -> None:
    documents = [d for d in python_stdlib_documents() if d.source in ("python-stdlib/abc.py", "python-stdlib/ast.py")]
    assert len(documents) == 2
    assert train_tokenizer(documents, tmp_path / "t.model", 600).vocab_size == 600


def test_sample_is_uniform_bounded_and_deterministic() -> None:
    texts = [f"line number {i:06d}" for i in range(2000)]
    sample = _sample_lines(texts, max_bytes=18 * 100, seed=1)
    assert len(sample) == 100
    assert sample == sorted(sample) == _sample_lines(texts, max_bytes=18 * 100, seed=1)
    assert 25 < sum(line < "line number 001000" for line in sample) < 75
    assert sample != _sample_lines(texts, max_bytes=18 * 100, seed=2)


def test_too_large_vocabulary_names_the_largest_that_works(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="largest that works") as error:
        train_tokenizer(["hello world how are you"], tmp_path / "t.model", 5000)
    assert error.value.limit is not None and str(error.value.limit) in str(error.value)
    assert not (tmp_path / "t.model").exists()
    train_tokenizer(["hello world how are you"], tmp_path / "t.model", error.value.limit)


def test_too_small_vocabulary_names_the_smallest_that_works(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="too small") as error:
        train_tokenizer(["hello world"], tmp_path / "t.model", 100)
    assert error.value.limit is not None and error.value.limit > 260


@pytest.mark.parametrize("texts", [[], [""], ["\n\n"]])
def test_no_text_is_refused(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(TokenizerError, match="no text"):
        train_tokenizer(texts, tmp_path / "t.model", 300)


def test_damaged_models_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="cannot read"):
        load_tokenizer(tmp_path / "missing.model")
    for content, message in ((b"", "empty file"), (b"not a model", "not a SentencePiece model")):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(tmp_path / "bad.model")


def test_ids_outside_the_vocabulary_and_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    for ids in ([tokenizer.vocab_size], [-1]):
        with pytest.raises(TokenizerError, match="outside the vocabulary"):
            tokenizer.decode(ids)
    with pytest.raises(TokenizerError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_foreign_model_that_normalises_still_works(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world how are you"] * 10), model_prefix=str(tmp_path / "m"), vocab_size=30,
        model_type="bpe", minloglevel=2,
    )  # fmt: skip
    foreign = load_tokenizer(tmp_path / "m.model")
    assert not foreign.is_exact
    assert foreign.decode(foreign.encode("hello world")) == "hello world"
    assert foreign.pad_id == foreign.eos_id
