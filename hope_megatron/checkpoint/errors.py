"""What can go wrong when a model is converted or loaded from files."""

from __future__ import annotations


class ConversionError(ValueError):
    """Files that cannot be converted or loaded. The message names the file or tensor, and the remedy."""

    is_user_error = True


class ExportCheckError(ConversionError):
    """The exported model, read back, does not compute what the checkpoint computes. Nothing was left behind."""


class ModelReferenceError(ValueError):
    """A model reference or its tokenizer leads nowhere."""

    is_user_error = True
