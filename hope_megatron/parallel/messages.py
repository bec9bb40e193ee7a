"""Control messages between ranks: typed data, never pickles, with a tag that only a rank of the same attempt can make.

JSON carries them. What JSON does not know is named: paths, and errors, whose classes must be exceptions that this
process has already imported from this project or from Python itself.
"""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hope_megatron.runtime.token import TAG_BYTES, is_authentic, tag

_OURS = ("hope_megatron.", "data_pipeline.", "launch.")


class ControlError(Exception):
    """A message that no rank of this attempt has sent, or whose content cannot be sent."""


class RemoteError(Exception):
    """An error of another rank, of a class that this process does not know; the message names it."""


def pack(value: Any, sender: int, number: int) -> bytes:
    """A message.

    Args:
        value: None, numbers, texts, lists, mappings with text keys, paths, exceptions.
        sender: rank that sends it.
        number: how many the sender has sent before.
    """
    data = json.dumps(_encode(value), separators=(",", ":")).encode()
    return tag(_header(sender, number) + data) + data


def unpack(message: bytes, sender: int, number: int) -> Any:
    """The value of a message.

    Raises:
        ControlError: it is not of this rank, number and attempt.
    """
    found, data = message[:TAG_BYTES], message[TAG_BYTES:]
    if not is_authentic(_header(sender, number) + data, found):
        raise ControlError(
            f"message {number} of rank {sender} is not from a rank of this attempt; who else uses its ports?"
        )
    return _decode(json.loads(data))


def _header(sender: int, number: int) -> bytes:
    return f"{sender}:{number}:".encode()


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, Mapping):
        return {"map": {_key(name): _encode(item) for name, item in value.items()}}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, BaseException):
        user_error = bool(getattr(value, "is_user_error", False))
        return {"error": [type(value).__module__, type(value).__qualname__, str(value), user_error]}
    raise ControlError(f"a {type(value).__name__} is no control message")


def _key(name: Any) -> str:
    if not isinstance(name, str):
        raise ControlError(f"the key {name!r} of a control message is no text")
    return name


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "map":
        return {name: _decode(item) for name, item in content.items()}
    if kind == "path":
        return Path(content)
    return _error(*content)


def _error(module: str, name: str, text: str, user_error: bool) -> Exception:
    """An exception of the class named, if it is one that this process knows; it takes its message as its only argument."""
    if module == "builtins":
        found = getattr(builtins, name, None)
    else:
        found = getattr(sys.modules.get(module), name, None) if module.startswith(_OURS) else None
    if isinstance(found, type) and issubclass(found, Exception):
        try:
            return found(text)
        except TypeError:
            pass
    error = RemoteError(f"{name}: {text}")
    if user_error:
        error.is_user_error = True  # type: ignore[attr-defined]
    return error
