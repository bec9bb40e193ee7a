"""A SentencePiece model as a tokenizer of transformers, for models that no fast tokenizer expresses: SentencePiece itself runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer


class HopeTokenizer(PreTrainedTokenizer):
    """The ids of the SentencePiece model for any text; the name of a special token in a text is text like any other."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012 - as transformers has it
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        from sentencepiece import SentencePieceProcessor

        self.vocab_file, self.processor = vocab_file, SentencePieceProcessor(model_file=vocab_file)
        self._longer: tuple[int, Any] = (0, self.processor)
        super().__init__(**{"split_special_tokens": True, **kwargs})

    def _with_added(self) -> Any:
        """SentencePiece with the tokens that were added: symbols of the user's, or control symbols where they are special."""
        added = [token for i, token in sorted(self.added_tokens_decoder.items()) if i >= self.vocab_size]
        if len(added) != self._longer[0]:
            from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

            model = sentencepiece_model_pb2.ModelProto()
            model.ParseFromString(self.processor.serialized_model_proto())
            for token in added:
                model.pieces.add(piece=token.content, score=0.0, type=3 if token.special else 4)
            self._longer = (len(added), SentencePieceProcessor(model_proto=model.SerializeToString()))
        return self._longer[1]

    @property
    def vocab_size(self) -> int:
        """Number of ids, without tokens that were added later."""
        return self.processor.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        """Ids by piece."""
        return {self.processor.id_to_piece(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self._with_added().encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.processor.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.processor.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces, bytes joined."""
        return self.processor.decode_pieces(tokens)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """The SentencePiece model goes with the tokenizer."""
        path = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}tokenizer.model"
        if path.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, path)
        return (str(path),)
