"""`hf`: an exported model that transformers loads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.open_tokenizer import load_tokenizer
from data_pipeline.tokenizer import Tokenizer
from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.config import RunConfig
from hope_megatron.convert.architecture import check_architecture
from hope_megatron.convert.formats import ExportOptions, Format
from hope_megatron.convert.huggingface.export import export_huggingface, load_huggingface, read_config
from hope_megatron.convert.huggingface.tokenizer_back import read_tokenizer
from hope_megatron.convert.huggingface.tokenizer_files import SLOW
from hope_megatron.convert.huggingface.weights import MAX_SHARD_BYTES
from hope_megatron.eval.heldout import manifest_tokens
from hope_megatron.model import LanguageModel


def _export(source: CheckpointSource, directory: Path, options: ExportOptions) -> list[str]:
    tokenizer = load_tokenizer(options.tokenizer or source.config.data.tokenizer)
    export = export_huggingface(
        source,
        directory,
        tokenizer,
        heldout=_heldout_sequence(source, tokenizer) if source.probe is None else None,
        max_shard_bytes=MAX_SHARD_BYTES if options.max_shard_gib is None else int(options.max_shard_gib * 2**30),
    )
    size = f"{export.weight_bytes / 2**20:,.1f} MiB of weights"
    lines = [f"{export.directory}: {export.num_parameters:,} parameters, {size}", f"checked: {export.check}"]
    return [*lines, export.tokenizer] if export.tokenizer == SLOW else lines


def _heldout_sequence(source: CheckpointSource, tokenizer: Tokenizer) -> Tensor | None:
    """[1, T] of the run's held-out tokens; None if it has none, or they are no longer where they were."""
    manifest = source.config.data.heldout
    if manifest is None or (isinstance(manifest, Path) and not manifest.exists()):
        return None
    tokens = manifest_tokens(manifest, tokenizer, source.config.training.seq_length)
    return torch.from_numpy(tokens[:-1]).unsqueeze(0)


def _load_model(directory: Path, config: RunConfig) -> LanguageModel:
    loaded = load_huggingface(directory)
    check_architecture(loaded.config.model_dump(), config.model.model_dump(), directory)
    return loaded.model


FORMAT = Format(
    export=_export,
    takes=frozenset({"tokenizer", "max_shard_gib"}),
    load_model=_load_model,
    read_model_config=read_config,
    read_tokenizer=read_tokenizer,
)
