"""A SentencePiece BPE model as a `tokenizer.json`, which the tokenizers library and transformers read.

SentencePiece merges the neighbours whose union has the best score; tokenizers follows a list of merges. The list of all
ways to split each piece in two, in the order of the pieces, makes both do the same. The one text that differs is a literal
U+2581, SentencePiece's mark for a space: the fast tokenizer reads it as a space.
"""

from __future__ import annotations

from typing import Any

SPACE_MARK = "\u2581"


def fast_tokenizer(model: bytes) -> dict[str, Any] | None:
    """Content of tokenizer.json for a SentencePiece model.

    Returns:
        None for a model that this form cannot express: not BPE, or without byte fallback.
    """
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=model)
    ids = range(processor.vocab_size())
    pieces = [processor.id_to_piece(i) for i in ids]
    special = [i for i in ids if processor.is_control(i) or processor.is_unknown(i)]
    normal = [i for i in ids if not processor.is_byte(i) and i not in special]
    has_bytes = len(pieces) - len(normal) - len(special) == 256
    if not has_bytes or [processor.get_score(i) for i in normal] != [-float(rank) for rank in range(len(normal))]:
        return None  # the scores of BPE pieces are their ranks; a unigram model has log probabilities
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special_token(i, pieces[i]) for i in special],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[processor.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": _merges([pieces[i] for i in normal]),
        },
    }


def _merges(pieces: list[str]) -> list[list[str]]:
    """Every way to make a piece of two others, in the order of the pieces."""
    known = set(pieces)
    return [
        [piece[:cut], piece[cut:]]
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def _special_token(token_id: int, piece: str) -> dict[str, Any]:
    matching = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": piece, **matching, "special": True}
