"""Any Hugging Face `tokenizer.json`, run by the tokenizers library, behind the interface of `data_pipeline.tokenizer`.

The file is taken as it is: its digest is that of its bytes, and an export carries them. What ends a document is not in it. The
`tokenizer_config.json` beside it says so, else a name that models use for it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import TokenizerError, require
from data_pipeline.files import write_atomic
from data_pipeline.tokenizer import PROBE, Tokenizer

CONFIG_NAME = "tokenizer_config.json"
_KNOWN = {
    "eos": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>", "[EOS]"),
    "bos": ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "[BOS]"),
    "unk": ("<unk>", "[UNK]"),
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>"),
}
"""Names of special tokens, looked for where no tokenizer_config.json names them."""


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`. Begin and end marks that its template would add are left out: the stream adds end marks.

    Args:
        model: content of the file.
        name: for messages.
        config: content of its tokenizer_config.json; {} if there is none.
    """

    file_name = "tokenizer.json"

    def __init__(self, model: bytes, name: str = "tokenizer.json", config: Mapping[str, Any] | None = None) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # documents are spread over processes already
        library = require("tokenizers", purpose="a tokenizer.json", install="tokenizers", extra="hf")
        try:
            self._tokenizer = library.Tokenizer.from_str(model.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{name} is not a tokenizer.json of the tokenizers library: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # the name of a special token in a text is text
        self.model = model
        self.digest = hashlib.sha256(model).hexdigest()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._config = dict(config or {})
        self.unk_id, self.bos_id, self.eos_id, pad_id = (
            _special_id(kind, vocabulary, self._config, name) for kind in ("unk", "bos", "eos", "pad")
        )
        if self.eos_id < 0:
            raise TokenizerError(
                f"{name} names no end mark, which must follow every document: put the model's {CONFIG_NAME}, with its eos_token, "
                "beside it"
            )
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id
        self.is_exact = self._round_trip(PROBE) and self._round_trip("a")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, self.file_name, self._config)

    def _round_trip(self, text: str) -> bool:
        return self.decode(self.encode(text)) == text

    def save(self, path: str | Path) -> None:
        """Write the file, atomically, and beside it which tokens are special."""
        write_atomic(path, self.model)
        ids = {"unk": self.unk_id, "bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        names = {f"{kind}_token": self.token(token_id) for kind, token_id in ids.items() if token_id >= 0}
        config = {**self._config, **names}
        write_atomic(Path(path).with_name(CONFIG_NAME), (json.dumps(config, indent=2) + "\n").encode())

    def token(self, token_id: int) -> str:
        """The name of a token."""
        return str(self._tokenizer.id_to_token(token_id))

    def encode(self, text: str, dtype: Any = np.int64) -> np.ndarray:
        try:
            return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=dtype)
        except (UnicodeError, TypeError) as error:
            raise TokenizerError("a text with a lone surrogate is not valid Unicode: repair or drop it.") from error

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return str(self._tokenizer.decode(self.checked(ids).tolist(), skip_special_tokens=True))

    def _join(self, ids: Iterable[int]) -> str:
        return self.decode(list(ids))


def read_config(path: Path) -> dict[str, Any]:
    """The tokenizer_config.json beside a tokenizer.json; {} if there is none.

    Raises:
        TokenizerError: it is not a JSON object.
    """
    config = path.with_name(CONFIG_NAME)
    if not config.is_file():
        return {}
    try:
        value = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{config} is not JSON: {error}. Restore it, or remove it.") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{config} holds no JSON object. Restore it, or remove it.")
    return value


def _special_id(kind: str, vocabulary: Mapping[str, int], config: Mapping[str, Any], name: str) -> int:
    """Id of a special token; -1 if there is none."""
    token = config.get(f"{kind}_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str):
        if token not in vocabulary:
            raise TokenizerError(f"the {CONFIG_NAME} of {name} says {kind}_token={token!r}, which is no token of it.")
        return vocabulary[token]
    return next((vocabulary[token] for token in _KNOWN[kind] if token in vocabulary), -1)
