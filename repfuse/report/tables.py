"""The few shapes that every rendering is made of. Text is never cut off: what does not fit goes on in the next line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

NUMBER = "right"
PLACES_SHOWN = 4
GOOD, BAD, UNSURE = "bold green", "bold red", "bold yellow"


def heading(text: str, style: str = "bold") -> Text:
    """Return a line that begins a part, with an empty line before it."""
    return Text(f"\n{text}", style=style)


def table(columns: Sequence[str | tuple[str, str]], rows: Iterable[Sequence[str]], *, total: bool = False) -> Padding:
    """Return a table. A column is a title, or a title and ``NUMBER``: those are aligned right and never broken.

    ``total`` sets the last row apart.
    """
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1))
    for column in columns:
        title, kind = (column, "") if isinstance(column, str) else column
        if kind == NUMBER:
            made.add_column(title, justify="right", no_wrap=True)
        else:
            made.add_column(title, overflow="fold")
    body = list(rows)
    for index, row in enumerate(body):
        made.add_row(*map(Text, row), end_section=total and index == len(body) - 2)
    return Padding(made, (0, 0, 0, 2))


def facts(pairs: Iterable[tuple[str, RenderableType]]) -> Padding:
    """Return names with their values, one below the other; pairs with an empty value are left out."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        if value != "":
            grid.add_row(name, Text(value) if isinstance(value, str) else value)
    return Padding(grid, (0, 0, 0, 2))


def places(names: Sequence[str]) -> str:
    """Return the first of the names, and where all of them are."""
    more = len(names) - PLACES_SHOWN
    return ", ".join(names[:PLACES_SHOWN]) + (f" and {more} more (--json lists all)" if more > 0 else "")


def notes(lines: Iterable[str]) -> Iterable[RenderableType]:
    """Yield each line as a note to the user."""
    for line in lines:
        yield Padding(Text.assemble(("note: ", "bold yellow"), line), (0, 0, 0, 2))
