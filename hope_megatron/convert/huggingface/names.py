"""Parameters under the names that transformers expects, and without the rows that pad the vocabulary.

The padding makes tensor parallelism divide the embedding; nothing reads it. Without it the embedding has as many rows as there
are ids, which is what `resize_token_embeddings` and other tools take for granted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from hope_megatron.config.model import ModelConfig

_VOCABULARY = ("embedding.weight", "head.weight")


def to_transformers(tensors: Iterable[tuple[str, Tensor]], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a LanguageModel, as they stand in an exported file."""
    for name, tensor in tensors:
        tensor = tensor[: config.vocab_size].clone() if name in _VOCABULARY else tensor
        yield ("lm_head.weight" if name == "head.weight" else f"model.{name}"), tensor


def from_transformers(tensors: Iterable[tuple[str, Tensor]], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The inverse: zeros for padding rows. Exports of earlier versions, with our names and padding, are read too."""
    for name, tensor in tensors:
        name = "head.weight" if name == "lm_head.weight" else name.removeprefix("model.")
        if name == "head.weight" and config.tie_embeddings:
            continue  # some tools repeat the embedding
        missing = config.padded_vocab_size - tensor.size(0)
        if name in _VOCABULARY and tensor.size(0) == config.vocab_size and missing:
            tensor = _with_rows(tensor, missing)
        yield name, tensor


def _with_rows(tensor: Tensor, count: int) -> Tensor:
    padded = tensor.new_zeros(tensor.size(0) + count, *tensor.shape[1:])
    padded[: tensor.size(0)] = tensor
    return padded
