"""Unpickling tensors from files of others: nothing but tensors, plain containers and named classes comes out of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hope_megatron.checkpoint.errors import ConversionError


def load_tensors(path: Path, stand_ins: Sequence[tuple[Callable[..., Any], str]] = (), mmap: bool = False) -> Any:
    """What `torch.save` wrote, by torch.load(weights_only=True), on the host.

    Args:
        path: the file.
        stand_ins: (harmless class of ours, full name in the pickle) of further classes that may be named there.
        mmap: whether tensors stay on disk until they are used.

    Raises:
        ConversionError: the file cannot be read, or names anything else; nothing of it was executed.
    """
    try:
        with torch.serialization.safe_globals([*stand_ins]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # a pickle can fail in any way
        raise ConversionError(
            f"{path} is refused, nothing was executed: only tensors and plain containers are unpickled: {_reason(str(error))}"
        ) from None


def _reason(text: str) -> str:
    """What is wrong, without PyTorch's advice to unpickle it all the same."""
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"it names {named[1]}"
    inner = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    return inner[1] if inner else text.partition("\n")[0]
