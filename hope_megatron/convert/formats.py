"""The foreign formats, by name. A format is a module with a `FORMAT`; its line in `FORMATS` makes every command know it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hope_megatron.runtime.registry import Entry, Registry

if TYPE_CHECKING:
    from hope_megatron.checkpoint.find import CheckpointSource
    from hope_megatron.checkpoint.unsharded import UnshardedCheckpoint
    from hope_megatron.config import ModelConfig, RunConfig
    from hope_megatron.model import LanguageModel


@dataclass(frozen=True)
class ExportOptions:
    """What a user may ask of an export. A format names those that it takes; others are refused."""

    tokenizer: Path | None = None
    """Another tokenizer than the run's."""
    max_shard_gib: float | None = None
    """Size of a weight file."""
    layout: dict[str, Any] = field(default_factory=dict)
    """Arguments of `ParallelLayout.changed`: the ranks that are to find their own files."""


@dataclass(frozen=True)
class Format:
    """What can be done with one format. What is None cannot.

    Attributes:
        export: writes a checkpoint into a directory, proves it by reading it back, and returns lines for the user.
        takes: names of the `ExportOptions` that `export` reads.
        restore: the whole checkpoint that an earlier export holds.
        load_model: the weights of a directory, whoever wrote it, as a model of a run's configuration.
        load_run: the same with optimizer states and clocks; see `begin_run.go_on`.
        read_model_config: the model section of a run file that fits a directory.
        split_mlp: that section with its MLP cut into levels of these hidden sizes.
        read_tokenizer: the tokenizer that belongs to a directory, a SentencePiece model or a tokenizer.json.
    """

    export: Callable[[CheckpointSource, Path, ExportOptions], list[str]] | None = None
    takes: frozenset[str] = frozenset()
    restore: Callable[[Path], UnshardedCheckpoint] | None = None
    load_model: Callable[[Path, RunConfig], LanguageModel] | None = None
    load_run: Callable[[Path, RunConfig, Callable[[int, int], Mapping[str, Any]]], UnshardedCheckpoint] | None = None
    read_model_config: Callable[[Path], ModelConfig] | None = None
    split_mlp: Callable[[ModelConfig, Sequence[int]], ModelConfig] | None = None
    read_tokenizer: Callable[[Path], bytes] | None = None


FORMATS = Registry(
    "format",
    {
        "hf": Entry(
            "hope_megatron.convert.huggingface.format:FORMAT", "Hugging Face layout, with its own modelling code"
        ),
        "torch_dist": Entry(
            "hope_megatron.convert.torch_dist:FORMAT", "Megatron-Core's distributed checkpoint, optimizer and all"
        ),
        "deepspeed": Entry(
            "hope_megatron.convert.deepspeed.format:FORMAT",
            "DeepSpeed's universal checkpoint, or with a layout the files of its own save_checkpoint",
        ),
        "llama": Entry(
            "hope_megatron.convert.llama:FORMAT", "a Llama, Mistral or Qwen model as Hope-Attention; import only"
        ),
    },
)


def open_format(name: str) -> Format:
    """The format of that name.

    Raises:
        UnknownNameError: there is none.
    """
    return FORMATS.open(name)
