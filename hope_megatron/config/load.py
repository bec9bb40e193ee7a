"""From YAML and dotted overrides to validated, frozen configurations.

Layers, later over earlier: the model preset, the run file, the overrides in the order given. Every mistake is reported
with its dotted key and the file or override that it came from.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from hope_megatron.config.base import ConfigError, Section
from hope_megatron.config.families import matched_levels
from hope_megatron.config.layout import ParallelLayout
from hope_megatron.config.messages import Location, dotted, explain
from hope_megatron.config.model import ModelConfig
from hope_megatron.config.presets import find_config, split_family
from hope_megatron.config.run import RunConfig
from hope_megatron.config.secrets import mask_credentials, unmask_tracking_uri
from hope_megatron.config.strict_yaml import MAX_CHARACTERS, MAX_DEPTH, dump_yaml, parse_yaml

SectionT = TypeVar("SectionT", bound=Section)


def load_run_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Load a run file.

    Args:
        path: a YAML file, or the name of one in configs/runs.
        overrides: `key.sub=value`, values in YAML; `model.cms.levels.0.hidden_size=512` reaches into lists.
            `model=NAME` replaces the whole model by a preset, `model.preset=NAME` keeps the file's changes to it.

    Raises:
        ConfigError: one line per mistake.
    """
    file = find_config(path, "runs")
    return resolve_run_config(read_mapping(file), overrides, source=str(file))


def load_model_config(name_or_path: str | Path, overrides: Iterable[str] = ()) -> ModelConfig:
    """Load a model by name (`hope_tiny`) or path; override keys start inside the model (`memory.chunk_tokens=16`).

    Raises:
        ConfigError: one line per mistake.
    """
    tree = _build_tree({"model": str(name_or_path)}, [f"model.{text}" for text in overrides], source=str(name_or_path))
    return _validate(ModelConfig, tree.data["model"], tree, ("model",))


def resolve_run_config(data: Mapping[str, Any], overrides: Iterable[str] = (), *, source: str) -> RunConfig:
    """Validate a run given as nested mappings, as a run file would hold them. Paths of data become absolute, and a tracking URI
    that had been masked is what the environment says it is.

    Args:
        data: keys and values; `model` may be the name of a preset, or hold a `preset` key beside its changes.
        overrides: as for `load_run_config`.
        source: where `data` came from, for messages.

    Raises:
        ConfigError: one line per mistake.
    """
    tree = _build_tree(data, overrides, source)
    config = _validate(RunConfig, tree.data, tree, ())
    paths: dict[str, Any] = {name: _absolute(value) for name, value in config.data if isinstance(value, Path)}
    paths["mix_with"] = {
        name: _absolute(path) if isinstance(path, Path) else path for name, path in config.data.mix_with.items()
    }
    tracking = config.tracking
    if tracking.uri is not None:
        tracking = tracking.model_copy(update={"uri": unmask_tracking_uri(tracking.uri)})
    if tracking.jsonl_file is not None:
        tracking = tracking.model_copy(update={"jsonl_file": _absolute(tracking.jsonl_file)})
    return config.model_copy(update={"data": config.data.model_copy(update=paths), "tracking": tracking})


_CHANGED = " (changed)"
_INNER_KEY = re.compile(
    r"cms\.(connection|inner_decay_towards|levels\.\d+\.inner_(chunk_tokens|rate|momentum|weight_decay))"
)


def in_layout(config: RunConfig, layout: ParallelLayout) -> RunConfig:
    """The configuration of the same run in another layout.

    Raises:
        ConfigError: the layout does not divide the model or the batch.
    """
    parallel = {
        **config.parallel.model_dump(),
        "tensor_parallel": layout.tensor_parallel,
        "sequence_parallel": layout.sequence_parallel,
        "zero_stage": layout.zero_stage,
    }
    changed = resolve_run_config({**config.model_dump(mode="json"), "parallel": parallel}, source="the new layout")
    changed.accumulation_steps(layout.world_size)
    return changed


def override_model(model: ModelConfig, overrides: Iterable[str]) -> ModelConfig:
    """A model with other settings, before it is built.

    Args:
        overrides: `memory.eta_init=0.5` and the like.

    Raises:
        ConfigError: with one line per mistake.
    """
    tree = _tree_of(model)
    for path, value, text in map(_parse_override, overrides):
        tree.set(("model", *path), value, text)
    return _validate(ModelConfig, tree.data["model"], tree, ("model",))


def change_model(model: ModelConfig, changes: Mapping[str, Any], source: str) -> ModelConfig:
    """A model with the settings of a file, nested or with dotted keys: mappings merge, everything else replaces.

    Args:
        model: only what it was set to counts; defaults, and what follows from other settings, follow the changes.
        changes: as in a model or family file.
        source: where they come from, for messages.

    Raises:
        ConfigError: with one line per mistake.
    """
    tree = _tree_of(model)
    tree.merge({"model": changes}, source)
    return _validate(ModelConfig, tree.data["model"], tree, ("model",))


def _tree_of(model: ModelConfig) -> _Tree:
    tree = _Tree("the model's configuration")
    tree.merge({"model": model.model_dump(mode="json", exclude_unset=True)}, "the model's configuration")
    return tree


def override_inner_clocks(model: ModelConfig, overrides: Iterable[str]) -> ModelConfig:
    """The configuration of a trained model with other clocks inside the context.

    Args:
        overrides: `cms.levels.0.inner_rate=0.01` and the like; only what needs no other parameters.

    Raises:
        ConfigError: a key that would change parameters, or one line per mistake.
    """
    overrides = tuple(overrides)
    for path, value, text in map(_parse_override, overrides):
        joins = path[-1] == "connection" and "independent" in (value, model.cms.connection)
        if joins or not _INNER_KEY.fullmatch(dotted(path)):
            raise ConfigError(
                f"{text}: a trained model can be given inner clocks only: cms.levels.N.inner_chunk_tokens, inner_rate, "
                "inner_momentum, inner_weight_decay, cms.inner_decay_towards, cms.connection=sequential or nested"
            )
    return override_model(model, overrides)


def dump_config(config: Section) -> str:
    """YAML that loads back to an equal configuration, defaults included; passwords in URIs are masked."""
    return mask_credentials(dump_yaml(config.model_dump(mode="json")))


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: if the file cannot be read, is not UTF-8, is not YAML, or holds something else.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(4 * MAX_CHARACTERS + 1).decode("utf-8")  # at most 4 bytes a character
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8 text") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        what = "empty" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"{path}: expected keys and values at the top level, but the file is {what}")
    return data


class _Tree:
    """Nested values, and for each location the file or override that set it last."""

    def __init__(self, source: str) -> None:
        self.data: dict[str, Any] = {}
        self._origins: dict[Location, str] = {}
        self._source = source

    def merge(self, update: Mapping[str, Any], source: str) -> None:
        """Lay a file over what is there: mappings merge, everything else replaces."""
        seen: set[Location] = set()
        for path, value in _leaves(update):
            if path in seen:
                raise ConfigError(f"{source}: {dotted(path)} is given twice; remove one")
            seen.add(path)
            self.set(path, value, source)

    def set(self, path: Location, value: Any, source: str) -> None:
        """Set one value, creating sections on the way; digits index lists that exist."""
        if len(path) > MAX_DEPTH:
            raise ConfigError(f"{source}: the key {dotted(path[:3])}... is nested deeper than {MAX_DEPTH} levels")
        node: Any = self.data
        done: Location = ()
        for part in path[:-1]:
            key = _key_in(node, part, done, source)
            done = (*done, key)
            if isinstance(node, dict):
                node.setdefault(key, {})
            node = node[key]
        last = _key_in(node, path[-1], done, source)
        done = (*done, last)
        if value == {} and isinstance(node, dict) and isinstance(node.get(last), dict):
            return  # an empty mapping changes nothing in a section
        node[last] = value
        self._origins = {known: text for known, text in self._origins.items() if known[: len(done)] != done}
        self._origins[done] = source

    def origin(self, location: Location) -> str:
        """Who set a location: itself, what it lies in, or what lies in it."""
        for depth in range(len(location), 0, -1):
            if location[:depth] in self._origins:
                return self._origins[location[:depth]]
            for known, source in self._origins.items():
                if known[:depth] == location[:depth]:
                    return source
        return self._source


def _build_tree(data: Mapping[str, Any], overrides: Iterable[str], source: str) -> _Tree:
    rest = _with_preset_in_section(data, source)
    model = (rest.pop("model"), source) if "model" in rest else None
    preset: tuple[Any, str] | None = None
    assignments: list[tuple[Location, Any, str]] = []
    for path, value, text in map(_parse_override, overrides):
        if path == ("model",):
            model, preset = (value, text), None
            assignments = [kept for kept in assignments if kept[0][0] != "model"]
        elif path == ("model", "preset"):
            preset = (value, text)
        else:
            assignments.append((path, value, text))

    tree = _Tree(source)
    if preset is not None:
        own = model[0] if model is not None and isinstance(model[0], dict) else {}
        _merge_model(tree, {"preset": preset[0]}, preset[1])
        model = ({key: value for key, value in own.items() if key != "preset"}, model[1] if model else source)
    if model is not None:
        named = _model_of(tree)
        _merge_model(tree, *model)
        _name_if_changed(tree, named)
    named = _model_of(tree)
    tree.merge(rest, source)
    for path, value, text in assignments:
        tree.set(path, value, text)
    _name_if_changed(tree, named)
    return tree


def _with_preset_in_section(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The dotted key `model.preset` of a file as the key of the model section that it is: a preset lies below all other keys."""
    rest = dict(data)
    if "model.preset" not in rest:
        return rest
    preset, section = rest.pop("model.preset"), rest.get("model", {})
    if not isinstance(section, dict) or "preset" in section:
        raise ConfigError(f"{source}: model.preset is given beside another model; remove one")
    return {**rest, "model": {"preset": preset, **section}}


def _merge_model(tree: _Tree, section: Any, source: str, chain: tuple[Path, ...] = ()) -> None:
    """Merge a model section over the preset it names, and that one over its own, if it names one."""
    if isinstance(section, str):
        section = {"preset": section}
    if isinstance(section, dict) and "preset" in section:
        section = dict(section)
        name = section.pop("preset")
        if not isinstance(name, str):
            raise ConfigError(f"{source}: model.preset must be the name of a preset or a path, not {name!r}")
        family = split_family(name)
        if family is not None:
            _merge_family(tree, name, *family)
            named = _model_of(tree)
            tree.merge({"model": section}, source)
            _name_if_changed(tree, named)
            return
        file = find_config(name, "models")
        if file in chain:
            raise ConfigError(f"{source}: presets name each other in a circle: {' -> '.join(map(str, (*chain, file)))}")
        _merge_model(tree, read_mapping(file), str(file), (*chain, file))
    named = _model_of(tree)
    tree.merge({"model": section}, source)
    _name_if_changed(tree, named)


def _model_of(tree: _Tree) -> dict[str, Any]:
    return copy.deepcopy(tree.data.get("model", {}))


def _name_if_changed(tree: _Tree, before: dict[str, Any]) -> None:
    """A model that is no longer what its preset is does not keep the preset's name: `hope_tiny (changed)`."""
    after = tree.data.get("model", {})
    name = before.get("name")
    if not isinstance(name, str) or after.get("name") != name or name.endswith(_CHANGED):
        return
    try:
        same = _bare_model(before) == _bare_model(after)
    except ValueError:
        return  # validation will say what is wrong
    if not same:
        after["name"] = name + _CHANGED


def _bare_model(data: dict[str, Any]) -> ModelConfig:
    return ModelConfig.model_validate_json(json.dumps({**data, "name": ""}, default=str), strict=True)


def _merge_family(tree: _Tree, name: str, family: str, base: str) -> None:
    """A baseline at the size of `base`: its family's settings, and a CMS of the width that matches the parameters."""
    file = find_config(family, "families")
    target = _Tree(base)
    _merge_model(target, base, base)
    model = _Tree(str(file))
    _merge_model(model, base, base)
    model.merge({"model": read_mapping(file)}, str(file))
    model.merge({"model": {"name": name}}, str(file))
    try:
        built = [_validate(ModelConfig, t.data["model"], t, ("model",)) for t in (model, target)]
    except ConfigError as error:
        raise ConfigError(f"{file}, over {base}: {error}") from None
    model.merge({"model": {"cms": {"levels": matched_levels(*built)}}}, str(file))
    tree.merge(model.data, str(file))


def _parse_override(text: str) -> tuple[Location, Any, str]:
    key, separator, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not separator or not all(path):
        raise ConfigError(
            f"override {mask_credentials(text)!r} is not of the form key.sub=value; for example optim.lr=1e-3"
        )
    source = f"override {mask_credentials(text)}"
    return path, parse_yaml(value, source), source


def _leaves(update: Mapping[str, Any], prefix: Location = ()) -> Iterable[tuple[Location, Any]]:
    for key, value in update.items():
        path = (*prefix, *key.split("."))
        if isinstance(value, dict) and value:
            yield from _leaves(value, path)
        else:
            yield path, value


def _key_in(node: Any, part: str | int, done: Location, source: str) -> str | int:
    """`part` as a key of `node`: itself in a mapping, its number in a list."""
    if isinstance(node, dict):
        return part
    if not isinstance(node, list):
        raise ConfigError(f"{source}: {dotted(done)} is {node!r}, which has no key {part!r}")
    if not str(part).isdecimal() or int(part) >= len(node):
        raise ConfigError(
            f"{source}: {dotted(done)} is a list of {len(node)}; use an index from 0 to {len(node) - 1}, not {part!r}"
        )
    return int(part)


def _validate(section: type[SectionT], data: Any, tree: _Tree, prefix: Location) -> SectionT:
    # Strict JSON mode: lists may be tuples and text may be paths, but "3" is no number and 1 is no boolean.
    try:
        return section.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise explain(error, section, tree.origin, prefix) from None


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))
