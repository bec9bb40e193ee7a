"""A checkpoint of four ranks."""

from hope_megatron.testing.checkpoints import make_checkpoint, model, tokenizer

__all__ = ["make_checkpoint", "model", "tokenizer"]
