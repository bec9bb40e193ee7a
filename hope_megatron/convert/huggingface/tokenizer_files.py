"""The tokenizer of an exported model: the SentencePiece model, and files from which transformers makes the same ids of any text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from hope_megatron.convert.huggingface.fast_tokenizer import fast_tokenizer

TOKENIZER_NAME = "tokenizer.model"

FAST = (
    "`tokenizer.model` is the SentencePiece model. `tokenizer.json` is the same tokenizer for transformers and gives the ids of "
    "SentencePiece for any text."
)
SLOW = (
    "`tokenizer.model` is the SentencePiece model. There is no `tokenizer.json`, because no fast tokenizer gives the ids of this "
    "SentencePiece model for every text. `AutoTokenizer.from_pretrained(..., trust_remote_code=True)` runs SentencePiece itself "
    "(`tokenization_hope.py`), which needs the package sentencepiece."
)
GIVEN = "`tokenizer.json` is the tokenizer that the training data was made with, byte for byte."
GIVEN_MARK = "hope_tokenizer"
"""Key of tokenizer_config.json where tokenizer.json is not made from a SentencePiece model."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""Plain text: a pretrained model knows no tokens of a chat. Fine-tuning may replace it."""


_SETTINGS = {
    "clean_up_tokenization_spaces": False,
    "split_special_tokens": True,  # "</s>" in a text is text
    "model_input_names": ["input_ids", "attention_mask"],
}


class TokenizerFile(Protocol):
    """What an export needs of a tokenizer."""

    file_name: str
    model: bytes
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int


def write_tokenizer(directory: Path, tokenizer: TokenizerFile) -> str:
    """Write the files of a tokenizer.

    Returns:
        FAST, SLOW or GIVEN: what was written, in a sentence for the user and the model card.
    """
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (directory / tokenizer.file_name).write_bytes(tokenizer.model)
    if tokenizer.file_name != TOKENIZER_NAME:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", GIVEN_MARK: tokenizer.file_name, **_SETTINGS}
        _write_json(directory / "tokenizer_config.json", {**settings, **_given_special_tokens(tokenizer)})
        return GIVEN
    fast = fast_tokenizer(tokenizer.model)
    settings = {**_SETTINGS, **_special_tokens(tokenizer)}
    if fast is not None:
        _write_json(directory / "tokenizer.json", fast)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    else:
        name = "tokenization_hope.py"
        text = Path(__file__).with_name("model").joinpath(name).read_text(encoding="utf-8")
        (directory / name).write_text(text, encoding="utf-8")
        auto_map = {"AutoTokenizer": ["tokenization_hope.HopeTokenizer", None]}
        settings = {"tokenizer_class": "HopeTokenizer", "auto_map": auto_map, **settings}
    _write_json(directory / "tokenizer_config.json", settings)
    return SLOW if fast is None else FAST


def _special_tokens(tokenizer: TokenizerFile) -> dict[str, str]:
    """Names of the special tokens that the model has; one without a pad piece pads with its end mark."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=tokenizer.model)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": processor.unk_id(), "pad": tokenizer.pad_id}
    return {f"{name}_token": processor.id_to_piece(i) for name, i in ids.items() if i >= 0}


def _given_special_tokens(tokenizer: Any) -> dict[str, str]:
    return {f"{name}_token": tokenizer.token(i) for name, i in tokenizer.special_ids.items() if i >= 0}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
