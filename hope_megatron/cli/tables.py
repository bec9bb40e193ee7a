"""Tables in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def new_table(title: str, *columns: str) -> Table:
    """Without lines: names in the first column, figures in the others."""
    from rich.table import Table

    made = Table(
        title=title or None, title_justify="left", title_style="bold", show_edge=False, pad_edge=False, box=None
    )
    for column in columns:
        made.add_column(column, justify="left" if column == columns[0] else "right", header_style="dim")
    return made
