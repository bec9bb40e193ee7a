"""The way back of a tokenizer: a SentencePiece model from the files that transformers saved, with the tokens added since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.convert.huggingface.fast_tokenizer import KINDS, SPACE_MARK
from hope_megatron.convert.huggingface.sentencepiece_model import model_proto
from hope_megatron.convert.huggingface.tokenizer_files import GIVEN_MARK, TOKENIZER_NAME
from hope_megatron.convert.huggingface.weights import read_json

_BPE = 2  # TrainerSpec.ModelType


def read_tokenizer(directory: Path) -> bytes:
    """The SentencePiece model of an exported model, also after fine-tuning: the same ids, and those of added tokens behind them;
    or the tokenizer.json that its data was made with.

    transformers saves a fast tokenizer without `tokenizer.model`; then it is made from `tokenizer.json`, which holds all of it. An
    added token becomes a symbol of the user's, or a control symbol if it is special: the name of that in a text is text.

    Raises:
        ConversionError: there is no tokenizer of ours, or its ids have gaps.
    """
    config = directory / "tokenizer_config.json"
    if config.is_file() and GIVEN_MARK in read_json(config):
        return (directory / "tokenizer.json").read_bytes()
    fast = directory / "tokenizer.json"
    content = read_json(fast) if fast.is_file() else {}
    proto = model_proto()
    if (directory / TOKENIZER_NAME).is_file():
        proto.ParseFromString((directory / TOKENIZER_NAME).read_bytes())
    elif content:
        _fill(proto, content, fast)
    else:
        raise ConversionError(
            f"{directory} holds neither {TOKENIZER_NAME} nor tokenizer.json; copy {TOKENIZER_NAME} from the export it comes from"
        )
    for token_id, token in sorted(_added(directory, content).items()):
        if token_id < len(proto.pieces):
            continue
        if token_id > len(proto.pieces):
            raise ConversionError(f"{directory}: the token ids have a gap before {token_id} ({token['content']!r})")
        kind = "control" if token.get("special") else "user_defined"
        if content and kind == "user_defined" and proto.normalizer_spec.add_dummy_prefix:
            raise ConversionError(
                f"{directory}: {token['content']!r} was added to a tokenizer that puts a space before a text. transformers puts "
                "one behind such a token too, SentencePiece does not: their ids would differ. Add it as a special token, or "
                "train a SentencePiece model with it as user-defined symbol"
            )
        proto.pieces.add(piece=token["content"], score=0.0, type=KINDS[kind])
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString()


def _added(directory: Path, content: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Tokens beside the pieces, by id."""
    if content:
        return {token["id"]: token for token in content.get("added_tokens", ())}
    config = directory / "tokenizer_config.json"
    known = read_json(config).get("added_tokens_decoder", {}) if config.is_file() else {}
    return {int(token_id): token for token_id, token in known.items()}


def _fill(proto: Any, content: dict[str, Any], path: Path) -> None:
    """What `fast_tokenizer` made of a SentencePiece model, taken apart again."""
    try:
        model, normalizer = content["model"], content["normalizer"]
        pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
        known = {token["content"]: token for token in content["added_tokens"] if token["id"] < len(pieces)}
        ours = model["type"] == "BPE" and model["byte_fallback"]
        parts = normalizer.get("normalizers", [normalizer])
        ours = ours and parts[-1].get("content") == SPACE_MARK
    except (KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise ConversionError(
            f"{path} is not the tokenizer of an exported HOPE model; put its {TOKENIZER_NAME} beside it"
        )
    rank = 0
    for piece in pieces:
        if piece == model["unk_token"]:
            kind = "unknown"
        elif piece in known:
            kind = "control" if known[piece]["special"] else "user_defined"
        else:
            kind = "byte" if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") else "normal"
        proto.pieces.add(piece=piece, score=-float(rank) if kind == "normal" else 0.0, type=KINDS[kind])
        rank += kind == "normal"
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback = _BPE, True
    trainer.unk_id, trainer.unk_piece = model["vocab"][model["unk_token"]], model["unk_token"]
    _name_special(directory=path.parent, trainer=trainer, vocabulary=model["vocab"])
    spec.name, spec.precompiled_charsmap = "identity", b""
    spec.add_dummy_prefix, spec.remove_extra_whitespaces, spec.escape_whitespaces = len(parts) > 1, False, True


def _name_special(directory: Path, trainer: Any, vocabulary: dict[str, int]) -> None:
    """Which pieces are begin, end and pad marks."""
    config = read_json(directory / "tokenizer_config.json")
    for name in ("bos", "eos", "pad"):
        token = config.get(f"{name}_token")
        piece = token["content"] if isinstance(token, dict) else token
        taken = name == "pad" and piece == trainer.eos_piece  # a model without a pad piece pads with its end mark
        token_id = vocabulary.get(str(piece), -1)
        setattr(trainer, f"{name}_id", -1 if taken else token_id)
        if token_id >= 0 and not taken:
            setattr(trainer, f"{name}_piece", piece)
