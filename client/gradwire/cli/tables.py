"""Tables on a terminal, which leave columns out where it is narrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

# In columns of the terminal.
_GAP, _BROKEN_TEXT = 2, 14


def title_text(text: str) -> Text:
    """Return what stands above a table or a picture."""
    return Text(f"\n{text}", "bold")


@dataclass(frozen=True)
class Column:
    """A column of a table. expendable: how early it is left out, if the terminal is too narrow; 0: never."""

    name: str
    cells: Sequence[str]
    expendable: int = 0
    is_text: bool = False

    @property
    def width(self) -> int:
        """What it must have: text can be broken."""
        longest = max(map(len, (self.name, *self.cells)))
        return min(longest, _BROKEN_TEXT) if self.is_text else longest


def table(title: str, columns: Sequence[Column], width: int, styles: Sequence[str] = ()) -> Table:
    """Return a table that is no wider than the terminal, as far as columns can be left out. styles: of rows."""
    shown = list(columns)
    while sum(column.width + _GAP for column in shown) > width:
        column = max(shown, key=lambda each: each.expendable)
        if not column.expendable:
            break
        shown.remove(column)
    made = Table(title=title_text(title), title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    made.padding, made.header_style = (0, _GAP - 1, 0, 0), "dim"
    for column in shown:
        if column.is_text:
            made.add_column(column.name, overflow="fold", min_width=column.width)
        else:
            made.add_column(column.name, justify="right", no_wrap=True)
    for place, cells in enumerate(zip(*(column.cells for column in shown), strict=True)):
        made.add_row(*cells, style=styles[place] if styles else None)
    return made
