"""Recurrent states in files: a text read once is continued later, at constant cost however long it was."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hope_megatron.generation.decoder import Decoder
from hope_megatron.generation.errors import GenerationError
from hope_megatron.model import LanguageModel, ModelState

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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"format": FORMAT, "model": model_identity(decoder.model)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise GenerationError(
            f"cannot write the state file {path}: {error.strerror}; name a path that you may write to"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: Path, model: LanguageModel) -> Decoder:
    """The decoder as it was saved, over the same model.

    Raises:
        GenerationError: the file is missing or damaged, or belongs to another model.
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
        state = ModelState.from_tensors(flat, like=model.init_state(pending.size(0))).to(device)
    return Decoder(model, pending.size(0), state=state, pending=pending.to(device), seen=seen.to(device))


def model_identity(model: LanguageModel) -> str:
    """A digest of the configuration and of the first 4 KiB of every parameter: cheap, and any step changes it."""
    digest = hashlib.sha256(json.dumps(model.model_config.model_dump(mode="json"), sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        head = parameter.detach().reshape(-1)[:1024].float().cpu().contiguous()
        digest.update(head.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
