"""Models in Hugging Face layout: a directory of safetensors, config.json, tokenizer and model card.

An export ends with a proof: the files are read back into a fresh model, which must compute the logits that the training
processes computed. Otherwise nothing is left behind.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from data_pipeline.tokenizer import tokenizer_beside
from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.checkpoint.local_model import build_local_model
from hope_megatron.checkpoint.output import fresh_directory
from hope_megatron.config.messages import explain
from hope_megatron.config.model import ModelConfig
from hope_megatron.convert.huggingface.check import ExportCheck, check_against_training
from hope_megatron.convert.huggingface.digests import verify_digests, write_digests
from hope_megatron.convert.huggingface.model_card import model_card
from hope_megatron.convert.huggingface.modeling_files import AUTO_MAP, modeling_files
from hope_megatron.convert.huggingface.names import from_transformers, to_transformers
from hope_megatron.convert.huggingface.tokenizer_files import TokenizerFile, write_tokenizer
from hope_megatron.convert.huggingface.weights import MAX_SHARD_BYTES, read_json, read_weights, write_weights
from hope_megatron.model import LanguageModel

MODEL_TYPE = "hope"
CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class Export:
    """What `export_huggingface` made and how it proved itself."""

    directory: Path
    num_parameters: int
    weight_bytes: int
    check: ExportCheck
    tokenizer: str
    """What transformers has for a tokenizer, in a sentence."""


@dataclass(frozen=True)
class HuggingFaceModel:
    """A model read from a directory in Hugging Face layout."""

    model: LanguageModel
    config: ModelConfig
    tokenizer_file: Path
    train_tokens_per_sequence: int
    """Sequence length in training: the window for evaluations that compare with it."""


def export_huggingface(
    source: CheckpointSource,
    out_dir: str | Path,
    tokenizer: TokenizerFile,
    *,
    heldout: Tensor | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Export:
    """Write a checkpoint, from any tensor-parallel and data-parallel layout, as a Hugging Face model directory.

    Args:
        source: the checkpoint; its digests are verified while it is read.
        out_dir: made new. An earlier export there is replaced; anything else is refused.
        tokenizer: the one the model was trained with.
        heldout: [1, T] held-out tokens for the check of a checkpoint that has no probe.
        max_shard_bytes: size at which a new weight file is begun.

    Raises:
        ConversionError: `out_dir` is taken, or the tokenizer is another one.
        CheckpointError: the checkpoint is damaged.
        ExportCheckError: the files do not compute what the checkpoint computes; `out_dir` is as it was.
    """
    out_dir, config = Path(out_dir), source.config.model
    if tokenizer.vocab_size != config.vocab_size:
        raise ConversionError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model of {source.path} {config.vocab_size}; "
            f"give the one it was trained with"
        )
    if config.attention.segment_tokens:
        raise ConversionError(
            f"{source.path} has attention.segment_tokens={config.attention.segment_tokens} (ARMT), which the exported model's code "
            "does not compute; use hope generate and hope eval on the run itself, or export torch_dist"
        )
    with fresh_directory(out_dir, is_huggingface_model) as directory:
        weight_bytes = write_weights(directory, to_transformers(source.tensors(), config), max_shard_bytes)
        _write_json(directory / CONFIG_NAME, _config_json(config, tokenizer, source.config.training.seq_length))
        _write_json(directory / "generation_config.json", _generation_json(tokenizer))
        tokenizer_note = write_tokenizer(directory, tokenizer)
        for name, text in modeling_files().items():
            (directory / name).write_text(text, encoding="utf-8")
        write_digests(directory)
        model = load_huggingface(directory).model
        check = check_against_training(model, source, heldout)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        card = model_card(source, out_dir.name, num_parameters, check, tokenizer_note)
        (directory / "README.md").write_text(card, encoding="utf-8")
        mode = (directory / CONFIG_NAME).stat().st_mode  # safetensors makes files that only their owner may read
        for path in directory.iterdir():
            path.chmod(mode)
    return Export(out_dir, num_parameters, weight_bytes, check, tokenizer_note)


def load_huggingface(directory: str | Path) -> HuggingFaceModel:
    """Build the model of a directory in Hugging Face layout, in one process, and load its weights in float32.

    Raises:
        ConversionError: a file is missing or damaged, the configuration is not one of ours, or a tensor does not match.
    """
    directory = Path(directory)
    verify_digests(directory)
    config, values = _read_config(directory)
    model = build_local_model(config, from_transformers(read_weights(directory), config), source=str(directory))
    return HuggingFaceModel(model, config, tokenizer_beside(directory), values["train_tokens_per_sequence"])


def is_huggingface_model(directory: str | Path) -> bool:
    """Whether `directory` holds a model of ours in Hugging Face layout."""
    try:
        return read_json(Path(directory) / CONFIG_NAME).get("model_type") == MODEL_TYPE
    except ConversionError:
        return False


def read_config(directory: Path) -> ModelConfig:
    """The architecture of a model of ours in Hugging Face layout."""
    return _read_config(directory)[0]


def _read_config(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
    path = directory / CONFIG_NAME
    values = read_json(path)
    if values.get("model_type") != MODEL_TYPE:
        raise ConversionError(
            f"{path} has model_type {values.get('model_type')!r}, not {MODEL_TYPE!r}: not a HOPE model"
        )
    try:
        config = ModelConfig.model_validate_json(json.dumps(values.get("architecture")), strict=True)
    except ValidationError as error:
        raise explain(error, ModelConfig, lambda _: str(path), ("architecture",)) from None
    if not isinstance(values.get("train_tokens_per_sequence"), int):
        raise ConversionError(f"{path} lacks train_tokens_per_sequence, a whole number; export the model again")
    for name, value in _summary(config).items():
        if values.get(name, _LEFT_OUT.get(name)) != value:
            raise ConversionError(f"{path}: {name}={values.get(name)} contradicts its architecture, which says {value}")
    return config, values


_LEFT_OUT = {"tie_word_embeddings": True}
"""transformers 4 writes no value that is its default, so a model tuned and saved by it may lack this."""


def _summary(config: ModelConfig) -> dict[str, Any]:
    """The architecture in the names that tools look for in any model's config.json."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _config_json(config: ModelConfig, tokenizer: TokenizerFile, seq_length: int) -> dict[str, Any]:
    return {
        "architectures": ["HopeForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": MODEL_TYPE,
        "dtype": "float32",
        **_summary(config),
        **_token_ids(tokenizer),
        "train_tokens_per_sequence": seq_length,
        "architecture": config.model_dump(mode="json"),
    }


def _generation_json(tokenizer: TokenizerFile) -> dict[str, Any]:
    return {"do_sample": True, "temperature": 0.8, "top_p": 0.95, **_token_ids(tokenizer)}


def _token_ids(tokenizer: TokenizerFile) -> dict[str, int]:
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return {name: value for name, value in ids.items() if value >= 0}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
