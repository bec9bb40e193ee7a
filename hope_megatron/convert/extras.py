"""What other formats have no place for: DIR/hope/ with checkpoint.json, generators, probe, and a manifest of all of DIR.

The manifest is written last and verified first: nothing in DIR is opened before its digest is known to be right.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from hope_megatron.checkpoint.errors import ConversionError
from hope_megatron.checkpoint.format import DESCRIPTION, MANIFEST, PROBE_NAME, foreign_files, write_json
from hope_megatron.checkpoint.generators import fresh_generator_states
from hope_megatron.checkpoint.unsharded import UnshardedCheckpoint, UnshardedParameter
from hope_megatron.config.layout import ParallelLayout
from hope_megatron.optim import ParamTags
from hope_megatron.runtime.files import file_sha256

log = logging.getLogger(__name__)

Parameters = Mapping[str, UnshardedParameter]

FOLDER = "hope"
GENERATORS = "generators.safetensors"
FORMAT = "hope-exchange-v1"


def write_extras(directory: Path, unsharded: UnshardedCheckpoint) -> None:
    """Describe an exported checkpoint and seal it; every other file must be there already."""
    folder = directory / FOLDER
    folder.mkdir()
    save_file(
        {
            f"{dp_rank}/{name}": state.contiguous()
            for dp_rank in range(unsharded.layout.data_parallel)
            for name, state in unsharded.generators(dp_rank, 0).items()
        },
        folder / GENERATORS,
    )
    for extra in unsharded.extra_files:
        shutil.copyfile(extra, folder / extra.name)
    parameters = [
        {
            "name": p.name,
            "full_shape": list(p.shape),
            "dtype": p.dtype,
            "tags": p.tags.to_dict(),
            "states": list(p.states),
        }
        for p in unsharded.parameters.values()
    ]
    description = {
        **unsharded.description,
        "format": FORMAT,
        "layout": unsharded.layout.describe(),
        "parameters": parameters,
    }
    write_json(folder / DESCRIPTION, description)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    write_json(
        folder / MANIFEST,
        {"format": FORMAT, "files": {str(path.relative_to(directory)): file_sha256(path) for path in files}},
    )


def has_extras(directory: Path) -> bool:
    """Whether an export of ours lies there."""
    return (directory / FOLDER / MANIFEST).is_file()


def read_extras(
    directory: Path,
    open_reader: Callable[[Parameters], Callable[[str, str], Tensor]],
    format_name: str,
    written_by: str | None = None,
) -> UnshardedCheckpoint:
    """A checkpoint from an export of ours, whose tensors a format's reader gives.

    Args:
        directory: the export.
        open_reader: called with the parameters once every digest has been found right; returns (parameter, state) ->
            tensor.
        format_name: of the export, for messages.
        written_by: how files of this format come about that are no export of ours, for messages.

    Raises:
        ConversionError: no export of ours lies there, or a file is missing or differs from its digest; names it.
    """
    if not has_extras(directory):
        origin = written_by or f"not written by `hope export {format_name}`"
        raise ConversionError(
            f"{directory} was {origin}: its files do not say what model, clocks and data position they belong to; start a run from "
            f"its weights with `hope import {format_name} DIR CONFIG`"
        )
    known = _verify(directory)
    folder = directory / FOLDER
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        layout = ParallelLayout.of(description.pop("layout"))
        parameters = {entry["name"]: _parameter(entry) for entry in description.pop("parameters")}
        del description["format"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConversionError(f"{folder / DESCRIPTION} does not describe a checkpoint: {error!r}") from None
    states = load_file(folder / GENERATORS)

    def generators(dp_rank: int, tp_rank: int) -> dict[str, Tensor]:
        prefix = f"{dp_rank}/"
        found = {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
        return found or fresh_generator_states(description["config"]["training"]["seed"], dp_rank)

    extra_files = (folder / PROBE_NAME,) if f"{FOLDER}/{PROBE_NAME}" in known else ()
    return UnshardedCheckpoint(
        str(directory), parameters, description, layout, open_reader(parameters), generators, extra_files
    )


def _parameter(entry: Mapping[str, Any]) -> UnshardedParameter:
    tags, states = ParamTags.from_dict(entry["tags"]), tuple(entry["states"])
    return UnshardedParameter(entry["name"], tuple(entry["full_shape"]), entry["dtype"], tags, states)


def _verify(directory: Path) -> set[str]:
    """Names of the files, whose digests have all been found right."""
    try:
        manifest: Any = json.loads((directory / FOLDER / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ConversionError(f"{directory / FOLDER / MANIFEST} cannot be read: {error}; export it again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ConversionError(f"{directory / FOLDER / MANIFEST} is not of the format {FORMAT}; export it again")
    files = manifest.get("files")
    needed = {f"{FOLDER}/{DESCRIPTION}", f"{FOLDER}/{GENERATORS}"}
    if not isinstance(files, dict) or not needed <= files.keys():
        raise ConversionError(f"{directory / FOLDER / MANIFEST} is not the manifest that was written; export it again")
    for name in foreign_files(directory, {f"{FOLDER}/{MANIFEST}", *files}):
        log.warning("%s is not in the manifest: it is no part of the export and is not read", directory / name)
    for name, sha256 in files.items():
        path = directory / name
        if ".." in path.parts or Path(name).is_absolute():
            raise ConversionError(f"{directory / FOLDER / MANIFEST} names {name!r}, outside of the export")
        if not path.is_file():
            raise ConversionError(f"{path} is missing; export it again")
        if file_sha256(path) != sha256:
            raise ConversionError(f"{path} is corrupt: its SHA-256 is not the one in the manifest; export it again")
    return set(files)
