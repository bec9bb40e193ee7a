"""Recurrent states in files: a text read once is continued later, at constant cost however long it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hope_megatron.config.model import CMSLevelConfig
from hope_megatron.generation.decoder import Decoder
from hope_megatron.generation.errors import GenerationError
from hope_megatron.model import LanguageModel, ModelState
from hope_megatron.model.in_context import InContextError, initial_inner_state
from hope_megatron.runtime.files import replacing

FORMAT = "hope-state-v1"
_STATE_PREFIX = "state."


def save_state(path: Path, decoder: Decoder) -> None:
    """Write everything a decoder needs to go on, atomically.

    Args:
        path: a safetensors file; replaced if it exists.
        decoder: any decoder; one that has not read a token yet is saved too.
    """
    tensors = {"pending": decoder.pending, "seen": decoder.seen}
    if decoder.state is not None:
        tensors |= {_STATE_PREFIX + name: tensor for name, tensor in decoder.state.tensors().items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"format": FORMAT, "model": model_identity(decoder.model)})
    except OSError as error:
        raise GenerationError(
            f"cannot write the state file {path}: {error.strerror}; name a path that you may write to"
        ) from error


def load_state(path: Path, model: LanguageModel, kind: type[Decoder] = Decoder) -> Decoder:
    """The decoder as it was saved, over the same model.

    Args:
        kind: LearningDecoder to go on learning in context. A plain decoder uses what was learnt, and learns no more.

    Raises:
        GenerationError: the file is missing or damaged, belongs to another model, or was learnt by other clocks.
    """
    if not path.is_file():
        raise GenerationError(f"the state file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise GenerationError(f"{path} is not a whole state file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise GenerationError(f"{path} is not a state file (format {metadata.get('format')!r}, not {FORMAT!r})")
    if metadata.get("model") != model_identity(model):
        raise GenerationError(
            f"{path} holds the state of another model; states only mean something to the weights that made them"
        )
    pending, seen = tensors.pop("pending"), tensors.pop("seen")
    device = next(model.parameters()).device
    state = None
    if tensors:
        flat = {name.removeprefix(_STATE_PREFIX): tensor for name, tensor in tensors.items()}
        state = _state_from(flat, model, pending.size(0), path).to(device)
    return kind(model, pending.size(0), state=state, pending=pending.to(device), seen=seen.to(device))


def _state_from(tensors: dict[str, Tensor], model: LanguageModel, batch_size: int, path: Path) -> ModelState:
    like = model.init_state(batch_size)
    if any(name.startswith("inner.") for name in tensors):
        try:
            like = like._replace(inner=initial_inner_state(model, batch_size))
        except InContextError:
            raise GenerationError(
                f"{path} was learnt in context; give the model its clocks with --learn KEY=VALUE"
            ) from None
    fits = like.tensors().items()
    if {name: t.shape for name, t in fits if name.startswith("inner.")} != {
        name: t.shape for name, t in tensors.items() if name.startswith("inner.")
    }:
        raise GenerationError(
            f"{path} was learnt in context by other clocks; give --learn the keys it was made with, or begin a new state file"
        )
    return ModelState.from_tensors(tensors, like=like)


def model_identity(model: LanguageModel) -> str:
    """A digest of the configuration and of the first 4 KiB of every parameter: cheap, and any step changes it."""
    clocks = {name for name in CMSLevelConfig.model_fields if name.startswith("inner_")}  # may change under a state
    changing: Any = {"cms": {"connection": True, "inner_decay_towards": True, "levels": {"__all__": clocks}}}
    config = model.model_config.model_dump(mode="json", exclude=changing)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        head = parameter.detach().reshape(-1)[:1024].float().cpu().contiguous()
        digest.update(head.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
