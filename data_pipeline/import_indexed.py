"""Import Megatron's .bin/.idx files without tokenizing again: the same ids, in verified shards with a held-out split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np

from data_pipeline.corpus import Document, ReadOptions
from data_pipeline.encode import EncodedDocument, Encoder
from data_pipeline.errors import TokenizerError
from data_pipeline.filters import Filters
from data_pipeline.indexed import IndexedFile
from data_pipeline.open_tokenizer import load_tokenizer
from data_pipeline.prepare import Running, prepare_files
from data_pipeline.prepare_settings import Settings
from data_pipeline.report import PrepareReport
from data_pipeline.source_files import SourceFile
from data_pipeline.sources import find_sources
from data_pipeline.tokenizer import Tokenizer

FORMAT = "hope-import-v1"


def import_indexed(
    prefixes: Sequence[str | Path],
    tokenizer: Tokenizer | str | Path,
    out_dir: str | Path,
    *,
    held_out_fraction: float = 0.01,
    shard_tokens: int = 1 << 24,
    deduplicate: bool = False,
    **running: Unpack[Running],
) -> PrepareReport:
    """Write ``out_dir/train`` and ``out_dir/heldout`` as `data_pipeline.prepare.prepare` does, from ids that exist.

    One end mark at the end of a document is taken off, because streams add it. Documents are decoded for the digest of their text,
    by which they are split and verified, as if they had been tokenized here. An interrupted import goes on where it stopped.

    Args:
        prefixes: paths with or without `.bin` or `.idx`.
        tokenizer: the one whose ids the files hold: a `Tokenizer`, or the path of a SentencePiece model or a tokenizer.json.
        out_dir, held_out_fraction, shard_tokens, running: as for `prepare`.
        deduplicate: reject documents whose text occurred before.

    Raises:
        SourceError: files are missing or damaged.
        TokenizerError: an id is outside the vocabulary.
    """
    files = [IndexedFile(prefix) for prefix in prefixes]
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)
    settings = Settings(held_out_fraction, shard_tokens, ReadOptions(), Filters(), deduplicate, None, 0, 1)
    return prepare_files(
        find_sources([file.bin_path for file in files]),
        tokenizer,
        Path(out_dir),
        settings,
        reader=read_indexed,
        encoder=IdsEncoder(tokenizer, settings.filters, settings.read.text_field, with_signature=False),
        format_name=FORMAT,
        **running,
    )


def read_indexed(file: SourceFile, options: ReadOptions) -> Iterator[Document]:
    """The documents of one data set, their ids as bytes."""
    for position, (tokens, done) in enumerate(IndexedFile(file.path).documents()):
        yield Document(file.name, position, tokens.tobytes(), file_bytes=done)


@dataclass(frozen=True)
class IdsEncoder(Encoder):
    """Takes ids as they are, where `Encoder` makes them from text."""

    def __call__(self, document: Document) -> EncodedDocument:
        tokens = np.frombuffer(document.data, dtype=np.int64)
        if len(tokens) and tokens[-1] == self.tokenizer.eos_id:
            tokens = tokens[:-1]
        if not len(tokens):
            return EncodedDocument(document.source, document.position, file_bytes=document.file_bytes, reason="empty")
        if not 0 <= tokens.min() <= tokens.max() < self.tokenizer.vocab_size:
            wrong = tokens.min() if tokens.min() < 0 else tokens.max()
            raise TokenizerError(
                f"document {document.position} of {document.source} holds the id {wrong}, outside the vocabulary of "
                f"{self.tokenizer.vocab_size}: name the tokenizer that the files were made with."
            )
        return self.encoded(document, self.tokenizer.decode(tokens), tokens.astype(self.tokenizer.token_dtype))
