"""A stream's state in a file: safetensors with a digest, the model it belongs to, and whose it is. Never a pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hope_megatron.generation.state_file import tensors_digest
from hope_megatron.runtime.files import replacing
from hope_megatron.serve.errors import ServeError

FORMAT = "hope-session-v1"


def model_identity(model: nn.Module) -> str:
    """A digest of every parameter's name and bytes: a state means something to these weights alone."""
    return tensors_digest({name: parameter.detach().cpu() for name, parameter in model.state_dict().items()})


def flatten(tree: Any, path: str = "s") -> tuple[Any, dict[str, Tensor]]:
    """Nested tuples of tensors, numbers and None as JSON and a flat dict of tensors."""
    if isinstance(tree, Tensor):
        return {"tensor": path}, {path: tree.detach().cpu().contiguous()}
    if isinstance(tree, tuple):
        parts = [flatten(item, f"{path}.{number}") for number, item in enumerate(tree)]
        tensors = {name: tensor for _, found in parts for name, tensor in found.items()}
        return [shape for shape, _ in parts], tensors
    if tree is None or isinstance(tree, (int, float)):
        return {"value": tree}, {}
    raise TypeError(f"a state holds a {type(tree).__name__}")


def unflatten(shape: Any, tensors: dict[str, Tensor], like: Any) -> Any:
    """The inverse; `like`, a state of the same model, gives the named tuples."""
    if isinstance(shape, list):
        parts = [unflatten(item, tensors, part) for item, part in zip(shape, like, strict=True)]
        return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
    return tensors[shape["tensor"]] if "tensor" in shape else shape["value"]


def save_session(path: Path, cache: Any, pending: list[int], about: dict[str, Any]) -> None:
    """Write a state of one row atomically, readable by its owner alone. `about` is JSON that `load_session` gives back."""
    shape, tensors = flatten(cache.layers) if cache is not None else (None, {})
    tensors["pending"] = torch.tensor(pending, dtype=torch.int64)
    position = int(torch.as_tensor(cache.position).reshape(-1)[0]) if cache is not None else 0
    # the digest covers what is beside the tensors too
    header = json.dumps({"shape": shape, "position": position, "about": about}, sort_keys=True)
    metadata = {"format": FORMAT, "header": header, "sha256": _digest(tensors, header)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
        temporary.chmod(0o600)


def read_about(path: Path) -> dict[str, Any]:
    """What was said about a session, without reading its tensors."""
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {})["header"])["about"]


def load_session(path: Path, like: Any) -> tuple[Any, list[int], dict[str, Any]]:
    """The state, its pending tokens and `about`, digests verified.

    Args:
        like: any HopeCache of one row of the same model.

    Raises:
        ServeError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if metadata.get("format") != FORMAT or metadata.get("sha256") != _digest(tensors, metadata.get("header", "")):
            raise ValueError("its digest is not that of its content")
        header = json.loads(metadata["header"])
        pending = tensors.pop("pending").tolist()
        cache = None
        if header["shape"] is not None:
            cache = type(like)(unflatten(header["shape"], tensors, like.layers), header["position"], 0)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ServeError(
            500,
            f"the file of this session is damaged ({error}); delete the session and begin it again",
            code="session_damaged",
        ) from error
    return cache, pending, header["about"]


def _digest(tensors: dict[str, Tensor], header: str) -> str:
    return tensors_digest(
        {**tensors, "header": torch.frombuffer(bytearray(header.encode() or b" "), dtype=torch.uint8)}
    )
