"""`deepspeed`: a universal checkpoint, or with a layout the files that DeepSpeed itself would save."""

from __future__ import annotations

from pathlib import Path

from hope_megatron.checkpoint.find import CheckpointSource
from hope_megatron.checkpoint.local_model import build_from_shards, build_local_model
from hope_megatron.checkpoint.unsharded import read_unsharded
from hope_megatron.config import RunConfig
from hope_megatron.convert.deepspeed.go_on import deepspeed_run
from hope_megatron.convert.deepspeed.native import read_deepspeed, write_native
from hope_megatron.convert.deepspeed.universal import universal_weights, write_universal
from hope_megatron.convert.deepspeed.zero import is_zero_checkpoint, zero_shards
from hope_megatron.convert.formats import ExportOptions, Format
from hope_megatron.model import LanguageModel


def _export(source: CheckpointSource, directory: Path, options: ExportOptions) -> list[str]:
    unsharded = read_unsharded(source).with_history("export to deepspeed")
    if options.layout:
        layout = unsharded.layout.changed(**options.layout)
        what, num_elements = f"deepspeed for {layout.in_words()}", write_native(unsharded, layout, directory)
    else:
        what, num_elements = "deepspeed, universal", write_universal(unsharded, directory)
    return [f"{directory}: {what}, of {unsharded.origin}", f"checked: {num_elements:,} numbers read back, all equal"]


def _load_model(directory: Path, config: RunConfig) -> LanguageModel:
    if is_zero_checkpoint(directory):
        return build_from_shards(config.model, zero_shards(directory), source=str(directory))
    return build_local_model(config.model, universal_weights(directory), source=str(directory))


FORMAT = Format(
    export=_export,
    takes=frozenset({"layout"}),
    restore=read_deepspeed,
    load_model=_load_model,
    load_run=deepspeed_run,
)
