"""A report as blocks, rendered as Markdown beside its pictures and as one HTML page that carries them."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2430;
  max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.8rem; margin-bottom: .2rem; }
h2 { font-size: 1.25rem; margin-top: 2.4rem; border-bottom: 1px solid #e3e7ee; padding-bottom: .2rem; }
.table { width: max-content; min-width: 100%; max-width: calc(100vw - 2.4rem); overflow-x: auto; margin: 1rem 0;
  position: relative; left: 50%; transform: translateX(-50%); }
table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid #e9edf3; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
@media print { .table { max-width: none; left: 0; transform: none; } th, td { white-space: normal; padding: .2rem .3rem; } }
th:first-child, td:first-child { text-align: left; } th { color: #5b6675; font-weight: 600; }
img { max-width: 100%; margin: .6rem 0; }
code, pre { background: #f3f5f9; border-radius: 4px; padding: .1rem .3rem; font-size: .87rem; }
pre { padding: .8rem 1rem; overflow-x: auto; } figcaption { color: #5b6675; font-size: .88rem; } figure { margin: 1rem 0; }
"""


@dataclass(frozen=True)
class Heading:
    """A section begins."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` and **bold** as in Markdown."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of short lines."""

    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first column is left-aligned."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG file beside the report."""

    file: Path
    caption: str


Block = Heading | Text | Bullets | Code | Table | Picture


def to_markdown(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """Markdown whose pictures are relative to `folder`."""
    parts = [f"# {title}"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"## {block.text}")
        elif isinstance(block, Text):
            parts.append(block.text)
        elif isinstance(block, Bullets):
            parts.append("\n".join(f"- {item}" for item in block.items))
        elif isinstance(block, Code):
            parts.append(f"```\n{block.text}\n```")
        elif isinstance(block, Table):
            rows = [block.header, [":--"] + ["--:"] * (len(block.header) - 1), *block.rows]
            parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
        else:
            parts.append(f"![{block.caption}]({block.file.relative_to(folder)})\n\n*{block.caption}*")
    return "\n\n".join(parts) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One page without anything beside it."""
    body = "\n".join(map(_html, blocks))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{html.escape(block.text)}</h2>"
    if isinstance(block, Text):
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Code):
        return f"<pre>{html.escape(block.text)}</pre>"
    if isinstance(block, Table):
        head = "".join(f"<th>{_inline(cell)}</th>" for cell in block.header)
        rows = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        return f'<div class="table">{table}</div>'
    data = base64.b64encode(block.file.read_bytes()).decode()
    caption = html.escape(block.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _inline(text: str) -> str:
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", escaped)
