"""Opens a tokenizer of either kind."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.errors import StoreError, TokenizerError
from data_pipeline.hf_tokenizer import HuggingFaceTokenizer, read_config
from data_pipeline.remote import read_bytes
from data_pipeline.tokenizer import Tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a model file or object: ours, any other SentencePiece model, or a Hugging Face tokenizer.json."""
    try:
        model = read_bytes(str(path)) if "://" in str(path) else Path(path).read_bytes()
    except (OSError, StoreError) as error:
        reason = error.reason if isinstance(error, StoreError) else error.strerror
        raise TokenizerError(f"cannot read the tokenizer {path}: {reason}. Check the path.") from error
    if not model:
        raise TokenizerError(f"the tokenizer {path} is an empty file. Train it again.")
    return make_tokenizer(model, str(path), beside=None if "://" in str(path) else Path(path))


def make_tokenizer(model: bytes, name: str = "tokenizer model", beside: Path | None = None) -> Tokenizer:
    """The tokenizer of a file's content.

    Args:
        model: a SentencePiece model, or the JSON of a tokenizer.json.
        name: for messages.
        beside: the file, whose neighbour tokenizer_config.json names the special tokens of a tokenizer.json.
    """
    if not model.lstrip().startswith(b"{"):
        return Tokenizer(model, name)
    return HuggingFaceTokenizer(model, name, read_config(beside) if beside is not None else None)
