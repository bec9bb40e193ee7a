"""A SentencePiece BPE model as a `tokenizer.json`, which the tokenizers library and transformers read.

SentencePiece merges the neighbours whose union has the best score; tokenizers follows a list of merges. The list of all
ways to split each piece in two, in the order of the pieces, makes both do the same.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import random
from collections.abc import Iterator
from typing import Any

from hope_megatron.convert.huggingface.sentencepiece_model import model_proto

log = logging.getLogger(__name__)

SPACE_MARK = "\u2581"
KINDS = {"normal": 1, "unknown": 2, "control": 3, "user_defined": 4, "byte": 6}
"""Kinds of pieces in a SentencePiece model."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = KINDS.values()


def fast_tokenizer(model: bytes) -> dict[str, Any] | None:
    """Content of tokenizer.json for a SentencePiece model: the same ids for any text.

    Returns:
        None for a model that this form cannot express: not BPE, without byte fallback, with a normalisation, with symbols of the
        user's beside a space before the text, or with symbols that overlap with special tokens. None too where the tokenizers
        library is installed and finds other ids for one of many texts.
    """
    proto = model_proto(model)
    if not _is_expressible(proto):
        return None
    content = _content(proto)
    return content if _agrees(content, model, proto) else None


def _is_expressible(proto: Any) -> bool:
    kinds = [piece.type for piece in proto.pieces]
    normal = [piece.score for piece in proto.pieces if piece.type == _NORMAL]
    symbols = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    special = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    normalizer = proto.normalizer_spec
    return (
        normal
        == [-float(rank) for rank in range(len(normal))]  # BPE scores are ranks, unigram scores log probabilities
        and kinds.count(_BYTE) == 256
        and set(kinds) <= {_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE}
        and not normalizer.precompiled_charsmap
        and not normalizer.remove_extra_whitespaces
        and normalizer.escape_whitespaces
        and not proto.trainer_spec.treat_whitespace_as_suffix
        and not (symbols and normalizer.add_dummy_prefix)
        and not any(" " in symbol or SPACE_MARK in symbol for symbol in symbols)
        and not any(_overlap(a, b) for a in symbols for b in special)
    )


def _overlap(a: str, b: str) -> bool:
    """Whether a text can hold both, one partly inside the other."""
    ends = range(1, min(len(a), len(b)) + 1)
    return a in b or b in a or any(a[-n:] == b[:n] or b[-n:] == a[:n] for n in ends)


def _content(proto: Any) -> dict[str, Any]:
    pieces = [(i, piece.piece, piece.type) for i, piece in enumerate(proto.pieces)]
    prefix = proto.normalizer_spec.add_dummy_prefix
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizers = [{"type": "Prepend", "prepend": SPACE_MARK}, space]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(i, piece, special=kind != _USER_DEFINED)
            for i, piece, kind in pieces
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if prefix else space,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [*decoders, {"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else decoders,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(piece for _, piece, kind in pieces if kind == _UNKNOWN),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece, _ in pieces},
            "merges": _merges([piece for _, piece, kind in pieces if kind == _NORMAL]),
        },
    }


def _agrees(content: dict[str, Any], model: bytes, proto: Any) -> bool:
    """Whether the tokenizers library gives SentencePiece's ids for many texts."""
    if importlib.util.find_spec("tokenizers") is None:
        log.info("the tokenizers library is not installed: tokenizer.json was not compared with SentencePiece")
        return True
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

    fast, slow = Tokenizer.from_str(json.dumps(content)), SentencePieceProcessor(model_proto=model)
    fast.encode_special_tokens = True  # as split_special_tokens in tokenizer_config.json: "<unk>" in a text is text
    return all(fast.encode(text, add_special_tokens=False).ids == slow.encode(text) for text in _probes(proto))


def _probes(proto: Any) -> Iterator[str]:
    """Texts that tell tokenizers apart: spaces, line ends, scripts, names of special tokens, and pieces in any order."""
    yield from ("", " ", "  a", "a  ", "a\n\n\tb \r\n", "e\u0301 \ufb01 \u2460 \u4e2d\U0001f600\0", f"a{SPACE_MARK}b")
    names = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)]
    yield from (a + b for a, b in itertools.product([*names, " ", "x"], repeat=2))
    texts = [piece.piece.replace(SPACE_MARK, " ") for piece in proto.pieces if piece.type != _BYTE]
    draw = random.Random(0)
    for _ in range(500):
        yield "".join(draw.choices(texts, k=draw.randint(1, 12)))


def _merges(pieces: list[str]) -> list[list[str]]:
    """Every way to make a piece of two others, in the order of the pieces."""
    known = set(pieces)
    return [
        [piece[:cut], piece[cut:]]
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def _added_token(token_id: int, piece: str, *, special: bool) -> dict[str, Any]:
    matching = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": piece, **matching, "special": special}
