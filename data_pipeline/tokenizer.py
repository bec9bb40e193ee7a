"""SentencePiece tokenizers whose round trip is exact for every valid UTF-8 text; a Hugging Face `tokenizer.json` is in
hf_tokenizer.py, and open_tokenizer.py tells which it is.

Settings that make it exact: identity normalisation, no dummy prefix, no collapsing of whitespace, byte fallback for
what the vocabulary lacks. One character is left that SentencePiece cannot carry, its own space mark U+2581, which it
decodes as a space; `Tokenizer.encode` spells that one in byte pieces, and `Tokenizer.decode` joins the bytes of the
pieces itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import io
import logging
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipeline.corpus import Document, Rejected, document_text
from data_pipeline.errors import TokenizerError, VocabularyError, require
from data_pipeline.files import write_atomic
from data_pipeline.manifest import TOKENIZER_NAME, TOKENIZER_NAMES

log = logging.getLogger(__name__)

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
SPACE_MARK = "\u2581"
_SPACE_MARK_BYTES = SPACE_MARK.encode()
# What normalisations change: runs and kinds of spaces, control characters, case, compatibility and combining forms.
PROBE = "  a\n\tB  \u00e9 e\u0301\ufb01\u2460\uff21\u4e2d\U0001f600\x00\r\n 12  "

ModelType = Literal["bpe", "unigram"]


def _sentencepiece() -> Any:
    return require("sentencepiece", purpose="a tokenizer", install="sentencepiece")


class Tokenizer:
    """A SentencePiece model with exact encoding and decoding.

    Attributes:
        file_name: name of its file beside shards.
        model: content of its file.
        digest: SHA-256 of the model file, hexadecimal. Shards and saved positions carry it.
        vocab_size: number of token ids.
        unk_id, bos_id, eos_id, pad_id: special ids. A model without a pad piece pads with its end mark.
        is_exact: whether decode(encode(text)) == text for every text; foreign models that normalise are not.
    """

    file_name = TOKENIZER_NAME

    def __init__(self, model: bytes, name: str = "tokenizer model") -> None:
        try:
            processor = _sentencepiece().SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, OSError) as error:
            raise TokenizerError(f"{name} is not a SentencePiece model: {error}") from error
        self.model = model
        self.digest = hashlib.sha256(model).hexdigest()
        self.vocab_size = int(processor.vocab_size())
        self.unk_id, self.bos_id, self.eos_id = processor.unk_id(), processor.bos_id(), processor.eos_id()
        if self.eos_id < 0:
            raise TokenizerError(f"{name} has no end mark (</s>), which must follow every document. Train one with it.")
        self.pad_id = processor.pad_id() if processor.pad_id() >= 0 else self.eos_id
        self._processor = processor
        self._byte_ids, self._piece_bytes = _piece_tables(processor)
        self.is_exact = self._decodes_exactly(PROBE)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model,)  # for worker processes; the libraries' objects do not travel

    def _decodes_exactly(self, text: str) -> bool:
        if self._byte_ids is None:
            return False
        return self._join(self._processor.encode(text)) == text and self._join(self._processor.encode("a")) == "a"

    def save(self, path: str | Path) -> None:
        """Write the model file, atomically."""
        write_atomic(path, self.model)

    @property
    def special_ids(self) -> dict[str, int]:
        return {"unk": self.unk_id, "bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}

    @property
    def token_dtype(self) -> np.dtype:
        """The dtype in which shards hold its ids: little-endian uint16 while 16 bits suffice, uint32 beyond."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def encode(self, text: str, dtype: Any = np.int64) -> np.ndarray:
        """Token ids of a text, without begin or end marks.

        Args:
            text: any valid text; control characters and the names of special tokens are text like any other.
            dtype: dtype of the result, int64 by default.

        Returns:
            Array [num_tokens].
        """
        try:
            if self.is_exact and SPACE_MARK in text:
                return np.asarray(self._encode_with_space_marks(text), dtype=dtype)
            return np.asarray(self._processor.encode(text), dtype=dtype)
        except (UnicodeError, RuntimeError) as error:  # which of them depends on the version of SentencePiece
            raise TokenizerError("a text with a lone surrogate is not valid Unicode: repair or drop it.") from error

    def _encode_with_space_marks(self, text: str) -> list[int]:
        assert self._byte_ids is not None
        mark = [self._byte_ids[byte] for byte in _SPACE_MARK_BYTES]
        first, *rest = text.split(SPACE_MARK)
        ids = list(self._processor.encode(first))
        for part in rest:
            ids += mark
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids. Begin, end and pad marks vanish; bytes that form no character become U+FFFD."""
        ids = self.checked(ids)
        return self._join(ids.tolist()) if self.is_exact else self._processor.decode(ids.tolist())

    def checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The ids as int64 [num_tokens]; one outside the vocabulary raises TokenizerError."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            wrong = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise TokenizerError(f"token id {wrong} is outside the vocabulary of {self.vocab_size}: another tokenizer?")
        return ids

    def _join(self, ids: Iterable[int]) -> str:
        return b"".join([self._piece_bytes[i] for i in ids]).decode("utf-8", errors="replace")


def tokenizer_beside(directory: Path) -> Path:
    """Where the tokenizer of a prepared directory lies."""
    found = [path for name in TOKENIZER_NAMES if (path := directory / name).exists()]
    return found[0] if found else directory / TOKENIZER_NAME


def _piece_tables(processor: Any) -> tuple[list[int] | None, list[bytes]]:
    """Ids of the 256 byte pieces (None without byte fallback), and the bytes that each id stands for."""
    byte_ids: dict[int, int] = {}
    piece_bytes = []
    for i in range(processor.vocab_size()):
        piece = processor.id_to_piece(i)
        if processor.is_byte(i):
            value = int(piece[1:-1], 16)  # spelt <0x41>
            byte_ids[value] = i
            piece_bytes.append(bytes([value]))
        elif processor.is_control(i):
            piece_bytes.append(b"")
        elif processor.is_unknown(i):
            piece_bytes.append("\ufffd".encode())
        else:
            piece_bytes.append(piece.replace(SPACE_MARK, " ").encode())
    return ([byte_ids[value] for value in range(256)] if len(byte_ids) == 256 else None), piece_bytes


# ---- training ------------------------------------------------------------------------------------------------------


def train_tokenizer(
    documents: Iterable[str | Document],
    out_path: str | Path,
    vocab_size: int,
    model_type: ModelType = "bpe",
    *,
    max_bytes: int = 1 << 28,
    seed: int = 0,
    character_coverage: float = 0.9995,
    num_threads: int = 1,
) -> Tokenizer:
    """Train a SentencePiece model and write it to ``out_path``, atomically.

    Args:
        documents: texts, or documents as `data_pipeline.corpus` reads them (text files only).
        out_path: where the model goes.
        vocab_size: number of ids, among them 4 special and 256 byte pieces.
        model_type: ``"bpe"`` or ``"unigram"``. Unigram's memory grows fast with the sample.
        max_bytes: size of the sample to train on. A larger corpus is sampled line by line, uniformly, by ``seed``.
        seed: of the sample. The same documents and settings give the same file.
        character_coverage: part of all characters that get a piece of their own; the rest is spelt in bytes.
        num_threads: threads of the unigram trainer.

    Raises:
        VocabularyError: the corpus supports fewer pieces, or its characters alone need more; ``limit`` says how many.
        TokenizerError: no text at all.
    """
    sample = _sample_lines(_texts(documents), max_bytes, seed)
    if not sample:
        raise TokenizerError("the corpus for the tokenizer holds no text. Name sources that hold some.")
    log.info("training a %s tokenizer of %d ids on %d lines", model_type, vocab_size, len(sample))
    model = io.BytesIO()
    try:
        _sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,  # runs of spaces are the indentation of code
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            character_coverage=character_coverage,
            max_sentence_length=_MAX_LINE_BYTES,
            num_threads=num_threads,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from error
    tokenizer = Tokenizer(model.getvalue())
    tokenizer.save(out_path)
    return tokenizer


def _training_error(message: str, vocab_size: int) -> TokenizerError:
    for pattern, advice in _VOCABULARY_ERRORS.items():
        if found := re.search(pattern, message):
            limit = int(found.group(1))
            return VocabularyError(f"vocab_size={vocab_size} is {advice.format(limit=limit)}", limit)
    return TokenizerError(f"SentencePiece could not train a tokenizer: {message}")


_VOCABULARY_ERRORS = {
    r"Please set it to a value <= (\d+)": "more than the corpus supports. The largest that works is {limit}: "
    "set vocab_size={limit} or less, or give more text.",
    r"smaller than required_chars\. \d+ vs (\d+)": "too small: 256 bytes, 4 special tokens and the characters of the corpus "
    "need at least {limit}. Set vocab_size above that, or lower character_coverage.",
}
"""What SentencePiece says of a vocabulary size that does not fit, with the limit in brackets; and what to do."""
_MAX_LINE_BYTES = 1 << 16


def _texts(documents: Iterable[str | Document]) -> Iterator[str]:
    for document in documents:
        if isinstance(document, str):
            yield document
            continue
        with contextlib.suppress(Rejected):
            yield document_text(document)


def _lines(text: str) -> Iterator[str]:
    """Pieces of a text that the trainer takes: no line ends, none of the two characters it reserves, none too long."""
    for line in re.split(rf"[\n\r\t\0{SPACE_MARK}]", text):
        for start in range(0, len(line), _MAX_LINE_BYTES // 4):
            yield line[start : start + _MAX_LINE_BYTES // 4]


def _sample_lines(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """A uniform sample of all lines within ``max_bytes``, in one pass and bounded memory, in their first order."""
    generator = random.Random(seed)
    kept: list[tuple[float, int, str]] = []  # a heap: the line with the highest draw is on top, and leaves first
    size = number = 0
    for text in texts:
        for line in _lines(text):
            heapq.heappush(kept, (-generator.random(), number, line))
            number += 1
            size += len(line.encode("utf-8", errors="ignore"))
            while size > max_bytes and len(kept) > 1:
                size -= len(heapq.heappop(kept)[2].encode("utf-8", errors="ignore"))
    return [line for _, _, line in sorted(kept, key=lambda entry: entry[1])]
