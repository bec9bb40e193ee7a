"""The fast tokenizer gives the ids of the SentencePiece model, and the text back."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from hope_megatron.convert.huggingface.fast_tokenizer import SPACE_MARK, fast_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers library judges the fast tokenizer")

TEXTS = [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-c]*.py"))]


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 1000)


@pytest.fixture(scope="module")
def fast(slow: Tokenizer) -> tokenizers.Tokenizer:
    content = fast_tokenizer(slow.model)
    assert content is not None
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = (
        True  # as split_special_tokens in tokenizer_config.json: "<unk>" in a text is text
    )
    return tokenizer


def test_code_it_was_trained_on_and_code_it_was_not(slow: Tokenizer, fast: tokenizers.Tokenizer) -> None:
    others = [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[d-h]*.py"))]
    for text in TEXTS + others:
        text = text.replace(SPACE_MARK, "")
        ids = fast.encode(text, add_special_tokens=False).ids
        assert ids == slow.encode(text).tolist()
        assert fast.decode(ids) == text


@settings(deadline=None, max_examples=400)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters=SPACE_MARK)))
def test_any_text(slow: Tokenizer, fast: tokenizers.Tokenizer, text: str) -> None:
    ids = fast.encode(text, add_special_tokens=False).ids
    assert ids == slow.encode(text).tolist()
    assert fast.decode(ids, skip_special_tokens=False) == text


@settings(deadline=None, max_examples=200)
@given(text=st.text(alphabet="aeinrst _.=()\n", max_size=200))
def test_text_full_of_merges(slow: Tokenizer, fast: tokenizers.Tokenizer, text: str) -> None:
    assert fast.encode(text, add_special_tokens=False).ids == slow.encode(text).tolist()


def test_unigram_models_are_left_out(tmp_path: Path) -> None:
    model = train_tokenizer(TEXTS[:3], tmp_path / "unigram.model", 400, model_type="unigram").model
    assert fast_tokenizer(model) is None


@pytest.mark.skipif(
    Version(version("sentencepiece")) < Version("0.2.3"), reason="older releases take any version of protobuf"
)
def test_a_protobuf_that_sentencepiece_refuses_is_one_line() -> None:
    program = """
import google.protobuf.runtime_version as runtime
runtime.MAJOR = 3
from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.convert.huggingface.sentencepiece_model import model_proto
try:
    model_proto()
except ConversionError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "runtime 3." in said and "pip install 'protobuf>=7.36.1'" in said and said.count("\n") == 1
