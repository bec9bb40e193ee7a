"""Configuration of a HOPE model for transformers."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "tie_word_embeddings": "tie_embeddings",
}
"""What transformers calls a part of the architecture, and what hope_megatron calls it."""


class HopeConfig(PretrainedConfig):
    """A decoder with self-modifying memories ("Nested Learning", arXiv 2512.24695).

    The usual attributes (`hidden_size`, ...) repeat parts of the architecture. Where they differ from it they win, so that
    `from_pretrained(..., num_hidden_layers=2)` and `resize_token_embeddings` do what they do for any model.

    Args:
        architecture: the resolved architecture, in the names of hope_megatron's `ModelConfig`.
        train_tokens_per_sequence: sequence length in training. It is no limit: the recurrent state has one size at any length.
        use_cache: whether the model returns the state of its streams by default, when it is not training.
    """

    model_type = "hope"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012 - as transformers has it

    def __init__(
        self,
        architecture: dict[str, Any] | None = None,
        train_tokens_per_sequence: int = 0,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.architecture = dict(architecture or {})
        self.train_tokens_per_sequence = train_tokens_per_sequence
        self.use_cache = use_cache
        for theirs, ours in NAMES.items():
            if ours in self.architecture:
                kwargs.setdefault(theirs, self.architecture[ours])
        tied = kwargs.setdefault("tie_word_embeddings", True)
        for name in NAMES:
            setattr(self, name, kwargs.get(name))
        super().__init__(**kwargs)
        self.tie_word_embeddings = tied  # transformers 4 sets a default of its own

    def resolved(self) -> dict[str, Any]:
        """The architecture, with what the usual attributes say."""
        if not self.architecture:
            raise ValueError(
                "HopeConfig has no architecture: read one with AutoConfig.from_pretrained(DIR, trust_remote_code=True) from "
                "an exported model, and change what should differ, for example num_hidden_layers=2"
            )
        said = {
            ours: getattr(self, theirs) for theirs, ours in NAMES.items() if getattr(self, theirs, None) is not None
        }
        return {**self.architecture, **said}

    def to_dict(self) -> dict[str, Any]:
        """For config.json: the architecture and the usual attributes agree."""
        values = super().to_dict()
        if self.architecture:
            values["architecture"] = self.resolved()
        return values

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self._derived("head_size") or self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Key-value heads of attention layers, where there are any."""
        return self._derived("attention").get("num_kv_heads") or self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        """Hidden width of the fastest level of the continuum memory system."""
        return self._derived("cms")["levels"][0]["hidden_size"]

    def _derived(self, name: str) -> Any:
        if name not in self.architecture:
            raise AttributeError(f"this HopeConfig has no architecture, hence no {name}")
        return self.architecture[name]
