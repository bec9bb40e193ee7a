"""The modelling code that travels with an exported model, so that transformers can load it without this project.

Layers and memory operator are not written twice: their modules are copied, and their imports of each other made relative.
"""

from __future__ import annotations

import re
from pathlib import Path

import hope_megatron

AUTO_MAP = {
    "AutoConfig": "configuration_hope.HopeConfig",
    "AutoModel": "modeling_hope.HopeModel",
    "AutoModelForCausalLM": "modeling_hope.HopeForCausalLM",
}

_PACKAGE = Path(hope_megatron.__file__).resolve().parent
_OWN_FILES = tuple(f"{part}_hope.py" for part in ("configuration", "modeling", "generation", "padding", "cache"))
_OURS = re.compile(r"^from hope_megatron\.((?:(?:ops|nn)\.(?:\w+\.)*\w+)|runtime\.step_parts) import", re.MULTILINE)
_INSTEAD = {
    "ops.memory.backends.installed": "convert/huggingface/model/memory_backends.py",
    "runtime.step_parts": "convert/huggingface/model/step_parts.py",
}
"""Compiled kernels and libraries stay here: what an exported model runs on is PyTorch."""
_HEADER = "# From hope_megatron {version}, Apache License 2.0.\n"


def modeling_files() -> dict[str, str]:
    """Text of every file by its name: configuration, model, and the modules of the operator that they need."""
    header = _HEADER.format(version=hope_megatron.__version__)
    files: dict[str, str] = {}
    waiting = {name: Path(__file__).with_name("model") / name for name in _OWN_FILES}
    while waiting:
        name, path = waiting.popitem()
        text = path.read_text(encoding="utf-8")
        waiting |= {
            f"{_flat_name(module)}.py": _PACKAGE / _INSTEAD.get(module, f"{module.replace('.', '/')}.py")
            for module in _OURS.findall(text)
            if f"{_flat_name(module)}.py" not in files
        }
        files[name] = header + _OURS.sub(lambda found: f"from .{_flat_name(found[1])} import", text)
    files["modeling_hope.py"] = _naming_all(files["modeling_hope.py"], sorted(files.keys() - set(_OWN_FILES)))
    return files


def _naming_all(text: str, names: list[str]) -> str:
    """The model's file with an import from every operator file: transformers 4 copies only those that it names itself."""
    last_import = "from .configuration_hope import HopeConfig\n"
    assert last_import in text
    imports = "".join(f"from .{name.removesuffix('.py')} import __doc__ as _\n" for name in names)
    return text.replace(last_import, last_import + imports)


def _flat_name(module: str) -> str:
    """`ops.memory.chunk` becomes `hope_memory_chunk`: the files of a model lie in one directory."""
    return "hope_" + module.removeprefix("ops.").replace(".", "_")
