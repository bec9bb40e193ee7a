"""Which documents are worth keeping. Each rule has a name, under which the documents it rejects are counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from data_pipeline.corpus import Rejected


@dataclass(frozen=True)
class Filters:
    """Limits on a document. The defaults reject only what holds no text."""

    min_chars: int = 1
    max_chars: int | None = None
    # Characters in lines that occurred before, as part of all characters in lines (blank lines aside). Gopher uses 0.2
    # (arXiv:2112.11446, table A1).
    max_repeated_lines: float = 1.0
    # Letters as part of all characters that are not spaces: low for tables, hex dumps and rulers.
    min_letters: float = 0.0

    def check(self, text: str) -> None:
        """Raise `Rejected` with the name of the first rule that the text breaks."""
        if not text or text.isspace():
            raise Rejected("empty")
        if "\0" in text:
            raise Rejected("nul_byte")
        if len(text) < self.min_chars:
            raise Rejected("too_short")
        if self.max_chars is not None and len(text) > self.max_chars:
            raise Rejected("too_long")
        if self.max_repeated_lines < 1.0 and repeated_line_ratio(text) > self.max_repeated_lines:
            raise Rejected("repeated_lines")
        if self.min_letters > 0.0 and letter_ratio(text) < self.min_letters:
            raise Rejected("few_letters")


def repeated_line_ratio(text: str) -> float:
    """Characters in repeated lines as part of all characters in lines; the first of equal lines is no repetition."""
    lines = Counter(line for line in map(str.strip, text.split("\n")) if line)
    total = sum(len(line) * count for line, count in lines.items())
    repeated = sum(len(line) * (count - 1) for line, count in lines.items())
    return repeated / total if total else 0.0


def letter_ratio(text: str) -> float:
    """Letters of any script as part of all characters that are not spaces."""
    visible = "".join(text.split())
    return sum(map(str.isalpha, visible)) / len(visible) if visible else 0.0
