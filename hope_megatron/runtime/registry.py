"""Things that are found by name: what a module offers, imported only when it is asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar


class UnknownNameError(KeyError):
    """No entry of that name. The message has the nearest and all."""

    is_user_error = True

    def __str__(self) -> str:
        return self.args[0]


class Entry(NamedTuple):
    """One row: `module:attribute`, and a line for people who choose."""

    target: str
    help: str


AnyEntry = TypeVar("AnyEntry", bound=Any)  # an Entry, or a class with the same two fields and more


class Registry(Mapping[str, AnyEntry], Generic[AnyEntry]):
    """Names to entries. A new entry is one module and one line here.

    Args:
        what: what an entry is, for messages: "optimizer".
        entries: in the order in which they are shown.
    """

    def __init__(self, what: str, entries: dict[str, AnyEntry]) -> None:
        self.what = what
        self._entries = entries

    def __getitem__(self, name: str) -> AnyEntry:
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UnknownNameError(f"no {self.what} {name!r}; {hint}Known: {', '.join(self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def open(self, name: str) -> Any:
        """Import what an entry names.

        Raises:
            UnknownNameError: there is no such entry.
        """
        module, _, attribute = self[name].target.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def table(self) -> str:
        """Names and help, a line each."""
        width = max(map(len, self._entries))
        return "\n".join(f"  {name:<{width}}  {entry.help}" for name, entry in self._entries.items())
