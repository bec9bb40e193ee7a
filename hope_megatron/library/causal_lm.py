"""The exported language model, built from a few sizes instead of an export's config.json. Needs transformers, not Megatron-Core."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hope_megatron.library.errors import LibraryError

try:
    from hope_megatron.convert.huggingface.model.configuration_hope import HopeConfig as ExportedConfig
    from hope_megatron.convert.huggingface.model.modeling_hope import HopeForCausalLM
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise LibraryError(
        "HopeForCausalLM is a transformers model, and transformers is not installed: pip install 'hope_megatron[transformers]'"
    ) from None

from hope_megatron.config.model import ModelConfig
from hope_megatron.nn.sizes import checked, cms

__all__ = ["HopeConfig", "HopeForCausalLM"]


class HopeConfig(ExportedConfig):
    """HopeConfig(vocab_size=..., hidden_size=..., num_hidden_layers=..., num_attention_heads=...), and it is complete.

    Args:
        architecture: that of an export; the rest is then taken from it.
        hidden_sizes: hidden width of each level of the continuum memory system; None means one of 4 hidden_size.
        memory, attention, layer_pattern, ...: further keys of a run file's section `model` (docs/configuration.md).
        kwargs: what transformers knows (eos_token_id, use_cache, ...).
    """

    def __init__(
        self,
        architecture: dict[str, Any] | None = None,
        *,
        hidden_sizes: Sequence[int] | None = None,
        update_periods: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        if architecture is None and kwargs.get("vocab_size") is not None:
            architecture = _architecture(hidden_sizes, update_periods, kwargs)
        super().__init__(architecture, **kwargs)


def _architecture(hidden_sizes: Any, update_periods: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A ModelConfig as JSON; its own keys leave `kwargs`."""
    renamed = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "tie_word_embeddings": "tie_embeddings",
    }
    sizes = {ours: kwargs[theirs] for theirs, ours in renamed.items() if kwargs.get(theirs) is not None}
    sizes |= {name: kwargs[name] for name in ("vocab_size", "hidden_size") if name in kwargs}
    own = set(ModelConfig.model_fields) - {"vocab_size", "hidden_size"}
    values = {name: kwargs.pop(name) for name in own & kwargs.keys()}
    if "cms" not in values:
        values["cms"] = cms("HopeConfig", kwargs.get("hidden_size", 1), hidden_sizes, update_periods)
    return json.loads(checked(ModelConfig, "HopeConfig", **sizes, **values).model_dump_json())
