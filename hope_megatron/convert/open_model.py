"""Any model a user names, opened in this process with its tokenizer. Importing this module is cheap; opening needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hope_megatron.checkpoint.errors import ModelReferenceError

if TYPE_CHECKING:
    from data_pipeline.tokenizer import Tokenizer
    from hope_megatron.config import RunConfig
    from hope_megatron.model import LanguageModel


@dataclass(frozen=True)
class OpenModel:
    """A model in this process, and what belongs to it."""

    name: str
    model: LanguageModel
    tokenizer: Tokenizer
    window_tokens: int
    """Sequence length in training."""
    run: RunConfig | None
    """The run's configuration; None for an exported model."""
    checkpoint: Path | None = None
    """The checkpoint that was opened; None for an exported model."""
    averaged: bool = False
    """Whether these are the checkpoint's averaged weights."""

    @property
    def title(self) -> str:
        """A short name: run and step, or the directory."""
        if self.checkpoint is None:
            return Path(self.name).name
        return f"{self.checkpoint.parent.parent.name}, {self.checkpoint.name}" + ", averaged weights" * self.averaged

    @property
    def directory(self) -> Path:
        """Where files about the model go: the run's directory, or the exported one."""
        if self.checkpoint is None:
            return Path(self.name)
        folder = self.checkpoint.parent
        return folder.parent if folder.name == "checkpoints" else folder


def open_model(reference: str, tokenizer_file: Path | None = None) -> OpenModel:
    """Load the model that `reference` names.

    Args:
        reference: a run directory (its newest checkpoint), RUN@STEP, a checkpoint, or an exported Hugging Face directory.
        tokenizer_file: instead of the one the model was trained with.
    """
    from data_pipeline.open_tokenizer import load_tokenizer, make_tokenizer
    from hope_megatron.checkpoint.find import find_checkpoint
    from hope_megatron.checkpoint.local_model import build_local_model
    from hope_megatron.convert.huggingface.export import is_huggingface_model, load_huggingface
    from hope_megatron.convert.huggingface.tokenizer_back import read_tokenizer

    directory = Path(reference)
    if is_huggingface_model(directory):
        loaded = load_huggingface(directory)
        if tokenizer_file is None:
            beside = directory / "tokenizer.json"
            tokenizer = make_tokenizer(read_tokenizer(directory), f"the tokenizer of {directory}", beside)
        else:
            tokenizer = load_tokenizer(tokenizer_file)
        opened = OpenModel(reference, loaded.model, tokenizer, loaded.train_tokens_per_sequence, None)
    else:
        source = find_checkpoint(reference)
        tokenizer = load_tokenizer(tokenizer_file or source.config.data.tokenizer)
        model = build_local_model(source.config.model, source.tensors(), source=str(source.path))
        window = source.config.training.seq_length
        opened = OpenModel(reference, model, tokenizer, window, source.config, source.path, source.averaged)
    vocab_size = opened.model.model_config.vocab_size
    if tokenizer.vocab_size != vocab_size:
        raise ModelReferenceError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {vocab_size}; give its own with --tokenizer"
        )
    return opened
