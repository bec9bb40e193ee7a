"""Whether the kernels are trusted for a case here: checked at first use, once per machine, and remembered.

A verdict is a file in the user's cache, named by a digest of all that it depends on. A failed one turns the kernels off, and is the
report to attach to a bug. Processes that need the same verdict wait for the one that finds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hope_megatron.ops.memory.backends.cache import cache_folder
from hope_megatron.ops.memory.backends.registry import Case

log = logging.getLogger(__name__)

MOST_ATTEMPTS = 2
"""Checks that may end with their process before the kernels are given up."""

WAIT_MESSAGE_S = 30.0
"""How often a waiting process says so."""

Check = Callable[[Case], dict[str, Any]]
"""check.check: {"trusted": bool, "reason": str, ...}."""


def distrust(case: Case, check: Check | None = None) -> str | None:
    """Why the kernels are not to be used for a case here, in words; None if they were found right.

    At first use it compiles and checks, or waits for the process of this machine that does. check: instead of check.check.
    """
    who = identity(case)
    return _distrust(json.dumps(who, sort_keys=True), case._replace(streams=0), check)


@functools.lru_cache(maxsize=256)
def _distrust(who: str, case: Case, check: Check | None) -> str | None:
    path = cache_folder() / f"triton-{hashlib.sha256(who.encode()).hexdigest()[:16]}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            verdict = _noted(path, json.loads(who), case, check)
    except OSError as error:
        log.warning("that the memory kernels were checked cannot be noted (%s): every process checks them", error)
        verdict = _checked(case, check)
    if verdict.get("trusted"):
        return None
    reason = verdict.get("reason", f"{MOST_ATTEMPTS} checks ended with their process")
    text = f"the self-check of the Triton kernels failed here: {reason}. Report: {path} (remove it to check again)"
    log.error("%s. PyTorch computes these memories instead, slower", text)
    return text


def _noted(path: Path, who: dict[str, Any], case: Case, check: Check | None) -> dict[str, Any]:
    """The verdict in the file, found and written if it is not there yet."""
    verdict = _read(path)
    attempts = 0 if verdict is None else verdict.get("attempts", MOST_ATTEMPTS)
    if verdict is not None and attempts >= MOST_ATTEMPTS:
        return verdict
    _write(path, who | {"attempts": attempts + 1})  # should the process not live to see the end
    verdict = who | _checked(case, check)
    _write(path, verdict)
    return verdict


def _checked(case: Case, check: Check | None) -> dict[str, Any]:
    if check is None:
        from hope_megatron.ops.memory.backends.triton.check import check
    log.info(
        "compiling and checking the memory kernels, once for this kind of device and memory; this takes minutes at most"
    )
    began = time.monotonic()
    # In a thread of its own nothing of the caller's is on: no_grad, autocast, hooks of checkpoints, dispatch modes.
    with ThreadPoolExecutor(1) as alone:
        found = alone.submit(_on_device, _device(case.device), check, case).result()
    seconds = round(time.monotonic() - began, 1)
    if found["trusted"]:
        log.info("the memory kernels are right here, checked in %.0f s", seconds)
    return found | {"seconds": seconds}


def _device(kind: str) -> int | None:
    return torch.cuda.current_device() if kind == "cuda" else None


def _on_device(index: int | None, check: Check, case: Case) -> dict[str, Any]:
    with contextlib.nullcontext() if index is None else torch.cuda.device(index):
        return check(case)


def identity(case: Case) -> dict[str, Any]:
    """All that a verdict depends on."""
    cuda = case.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "Triton's interpreter on a CPU",
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "driver": _driver() if cuda else None,
        "triton": version("triton"),
        "torch": torch.__version__,
        "kernels": source_digest(),
        "rule": asdict(case.rule),
        "rates": list(case.rates),
        "d": case.d,
        "h": case.h,
        "precision": case.precision,
    }


@functools.cache
def source_digest() -> str:
    """Of every file of this package."""
    found, here = hashlib.sha256(), Path(__file__).resolve().parent
    for path in sorted(here.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _driver() -> str | None:
    """NVIDIA's driver, where the system tells."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    match = re.search(r"\d+\.\d+(\.\d+)?", text)
    return match and match.group()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes that share the cache; says that it waits, and for how long."""
    with open(path, "w") as lock:
        began = said = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = time.monotonic()
                if said == began or now - said > WAIT_MESSAGE_S:
                    said = now
                    waited = f"waiting since {now - began:.0f} s for"
                    log.info("process %d: %s another process, which checks the memory kernels", os.getpid(), waited)
                time.sleep(0.2)
        yield


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: dict[str, Any]) -> None:
    """Beside the file first, then in its place: a verdict that is there is whole."""
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps({"digest": _digest(content), **content}, indent=1), encoding="utf-8")
    beside.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    """None if there is no verdict, or not the one that was written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("digest")
    except (FileNotFoundError, ValueError, KeyError, AttributeError):
        return None
    return content if digest == _digest(content) else None
