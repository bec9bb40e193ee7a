"""A small tokenizer and small corpora, made once per test session."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from data_pipeline.corpus import ReadOptions
from data_pipeline.manifest import Manifest
from data_pipeline.open_tokenizer import load_tokenizer
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import Tokenizer, train_tokenizer

WORDS = [
    "the",
    "memory",
    "of",
    "a",
    "model",
    "is",
    "its",
    "own",
    "past",
    "and",
    "a",
    "sample",
    "of",
    "the",
    "stream",
    "begins",
    "where",
    "one",
    "before",
    "it",
    "ended",
]


def _make_texts(count: int, seed: int = 0, max_words: int = 120) -> list[str]:
    """Distinct texts of several lines."""
    generator = random.Random(seed)
    return [
        f"document {seed} {number}\n" + " ".join(generator.choices(WORDS, k=generator.randint(1, max_words)))
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def make_texts() -> Callable[..., list[str]]:
    return _make_texts


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(_make_texts(200) + ["def f(x):\n    return x  # caf\u00e9"], path, vocab_size=400)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., Path]:
    """Write texts as files of one directory, several documents (lines) each."""

    def write(texts: Iterable[str], name: str = "corpus", per_file: int = 25) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        lines = [text.replace("\n", " ") for text in texts]
        for start in range(0, len(lines), per_file):
            content = "\n".join(lines[start : start + per_file]) + "\n"
            (directory / f"part-{start:06d}.txt").write_text(content, encoding="utf-8")
        return directory

    return write


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A prepared directory: 300 documents in many small train shards, some held out."""
    root = tmp_path_factory.mktemp("dataset")
    source = root / "corpus.txt"
    source.write_text("\n".join(text.replace("\n", " ") for text in _make_texts(300, seed=1)), encoding="utf-8")
    prepare(
        [source], tokenizer, root / "data", held_out_fraction=0.1, shard_tokens=1000, read=ReadOptions(text_unit="line")
    )
    return root / "data"


@pytest.fixture(scope="session")
def manifest(dataset: Path) -> Manifest:
    return Manifest.load(dataset / "train")
