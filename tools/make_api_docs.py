"""Write docs/api.md from the docstrings of what the library offers.

python tools/make_api_docs.py            write it
python tools/make_api_docs.py --check    fail if it is not what the docstrings say
"""

from __future__ import annotations

import argparse
import functools
import inspect
import re
import sys
from pathlib import Path
from typing import Any, is_typeddict

PAGE = Path(__file__).resolve().parents[1] / "docs/api.md"
_ANNOTATION = re.compile(r": '([^']*)'")
HEADER = """# What the library offers

Written from the docstrings by `tools/make_api_docs.py`; [library](library.md) shows how to use it.
"""


OPTIMIZERS = ("SharedSettings", "M3", "Muon", "AdaMuon", "AdamW", "SGD", "DGD", "DeltaMomentum", "DMGD")


def entries() -> list[tuple[str, Any]]:
    """Where each public name is imported from, and the thing itself."""
    import hope_megatron
    from hope_megatron import nn, optim

    found = {f"hope_megatron.{name}": getattr(hope_megatron, name) for name in sorted(hope_megatron.__all__)}
    found |= {f"hope_megatron.nn.{name}": getattr(nn, name) for name in nn.__all__ if name.endswith("State")}
    found |= {f"hope_megatron.optim.{name}": getattr(optim, name) for name in OPTIMIZERS}
    found.pop("hope_megatron.__version__")
    return list(found.items())


def section(name: str, thing: Any) -> str:
    """Signature and docstring; of a class also its own public methods and properties."""
    text = f"## {name}\n\n```\n{_signature(name.rpartition('.')[2], thing)}\n```\n\n{_docstring(thing)}\n"
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            doc = _docstring(getattr(value, "func", value))  # of cached properties
            told = inspect.isfunction(value) or isinstance(value, (property, functools.cached_property))
            told &= not hasattr(value, "hooked")  # torch puts `step` into the class of an optimizer that was made
            if told and doc and not member.startswith("_"):
                text += f"\n`{member}`: {doc.splitlines()[0]}\n"
    return text


def _signature(name: str, thing: Any) -> str:
    if is_typeddict(thing):
        keys = (f"    {key}: {kind.__forward_arg__}," for key, kind in inspect.get_annotations(thing).items())
        return "\n".join([f"{name}(", *keys, ")"])
    signature = inspect.signature(thing)
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "args")]
    parts = ["    " + _ANNOTATION.sub(r": \1", str(p)) + "," for p in parameters]  # annotations without their quotes
    keyword = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
    if keyword is not None:
        parts.insert(keyword, "    *,")
    return "\n".join([f"{name}(", *parts, ")"])


def _docstring(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "")


def page() -> str:
    """What docs/api.md should hold."""
    return HEADER + "".join(f"\n{section(name, thing)}" for name, thing in entries())


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = page()
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/api.md is not what the docstrings say; run python tools/make_api_docs.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
