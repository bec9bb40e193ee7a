"""Finding configuration files by name: `hope_tiny` means configs/models/hope_tiny.yaml, wherever the configs are.

`titans_60m` means configs/families/titans.yaml over hope_60m.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from hope_megatron.config.base import ConfigError

Kind = Literal["models", "families", "runs", "clusters", "sweeps"]

_PACKAGE_DIR = Path(__file__).resolve().parents[1]
_SUFFIXES = (".yaml", ".yml")
_FAMILY_BASE = "hope"


def config_dirs(kind: Kind) -> list[Path]:
    """Where named configurations are, first match wins: ./configs, the repository's, the installed package's."""
    roots = [Path("configs")]
    if (_PACKAGE_DIR.parent / "setup.py").is_file():
        roots.append(_PACKAGE_DIR.parent / "configs")
    roots.append(_PACKAGE_DIR / "configs")
    return [root / kind for root in roots]


def config_names(kind: Kind) -> list[str]:
    """Names that `find_config` knows, sorted."""
    return sorted(
        {path.stem for folder in config_dirs(kind) for suffix in _SUFFIXES for path in folder.glob(f"*{suffix}")}
    )


def split_family(name: str) -> tuple[str, str] | None:
    """("titans", "hope_60m") for "titans_60m"; None if it is not the name of a family at a size."""
    family, _, size = name.rpartition("_")
    base = f"{_FAMILY_BASE}_{size}"
    if family in config_names("families") and base in config_names("models"):
        return family, base
    return None


def family_names() -> list[str]:
    """All families at all sizes."""
    sizes = [
        name.removeprefix(f"{_FAMILY_BASE}_") for name in config_names("models") if name.startswith(f"{_FAMILY_BASE}_")
    ]
    return [f"{family}_{size}" for family in config_names("families") for size in sizes]


def find_config(name_or_path: str | Path, *kinds: Kind) -> Path:
    """The file behind a name (`hope_tiny`) or a path (`my/model.yaml`).

    Raises:
        ConfigError: if there is no such file; names the nearest one.
    """
    text = str(name_or_path)
    path = Path(text)
    if path.suffix in _SUFFIXES or len(path.parts) != 1:
        if path.is_file():
            return path
        raise ConfigError(f"no configuration file {text}; check the path, or give a name from configs/{kinds[0]}")
    for folder in (folder for kind in kinds for folder in config_dirs(kind)):
        for suffix in _SUFFIXES:
            if (folder / (text + suffix)).is_file():
                return folder / (text + suffix)
    names = [name for kind in kinds for name in config_names(kind)]
    families = family_names() if "models" in kinds else []
    near = difflib.get_close_matches(text, names + families, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    known = ", ".join(names) or "none found; is the `configs` directory missing?"
    if families:
        known += f"; and FAMILY_SIZE with FAMILY one of {', '.join(config_names('families'))}"
    raise ConfigError(f"no configuration named {text!r} in configs/{' or configs/'.join(kinds)}; {hint}Known: {known}")
