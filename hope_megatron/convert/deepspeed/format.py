"""`deepspeed`: a universal checkpoint, or with a layout the files that DeepSpeed itself would save."""

from __future__ import annotations

from pathlib import Path

from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.checkpoint.local_model import build_from_shards, build_local_model
from hope_megatron.checkpoint.unsharded import read_whole
from hope_megatron.config import RunConfig
from hope_megatron.convert.deepspeed.native import read_deepspeed, write_native
from hope_megatron.convert.deepspeed.universal import universal_weights, write_universal
from hope_megatron.convert.deepspeed.zero import is_zero_checkpoint, zero_shards
from hope_megatron.convert.formats import ExportOptions, Format
from hope_megatron.model import LanguageModel


def _export(source: CheckpointSource, directory: Path, options: ExportOptions) -> list[str]:
    whole = read_whole(source).with_history("export to deepspeed")
    if options.layout:
        layout = whole.layout.changed(**options.layout)
        what, num_elements = f"deepspeed for {layout.in_words()}", write_native(whole, layout, directory)
    else:
        what, num_elements = "deepspeed, universal", write_universal(whole, directory)
    return [f"{directory}: {what}, of {whole.origin}", f"checked: {num_elements:,} numbers read back, all equal"]


def _load_model(directory: Path, config: RunConfig) -> LanguageModel:
    if is_zero_checkpoint(directory):
        return build_from_shards(config.model, zero_shards(directory), source=str(directory))
    return build_local_model(config.model, universal_weights(directory), source=str(directory))


FORMAT = Format(export=_export, takes=frozenset({"layout"}), restore=read_deepspeed, load_model=_load_model)
