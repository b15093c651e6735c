"""The few shapes that every rendering is made of. Text is never cut off: what does not fit goes on in the next line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import floor, inf

from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from repfuse.wording import small

# Numbers as people read them: 1.23 M, 151 KiB, 2.31 ms, 4.2e-16.


NOTHING = "-"


def count(number: float | None) -> str:
    """Return a count with three digits and a decimal prefix: 0, 999, 1.23 k, 45.6 M; ``-`` for None."""
    return _scaled(number, 1000, ("", "k", "M", "G", "T", "P"))


def size(number: float | None) -> str:
    """Return bytes with three digits and a binary prefix: 512 B, 1.5 KiB, 12.3 MiB; ``-`` for None."""
    return _scaled(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def duration(seconds: float) -> str:
    """Return a time with three digits: 12.3 µs, 4.56 ms, 7.89 s, 3 min 20 s; below 0 what was lost."""
    if seconds < 0:
        return f"−{duration(-seconds)}"
    if 120 <= seconds < inf:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    parts, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{_three_digits(seconds * parts)} {unit}"


def error(number: float | None) -> str:
    """Return an error with two digits: 0, 4.2e-16; ``-`` for None."""
    return NOTHING if number is None else small(number)


def percent(fraction: float | None) -> str:
    """Return a fraction as a percentage that says 100 % only where nothing is missing; ``-`` for None."""
    if fraction is None:
        return NOTHING
    if 0.9995 <= fraction < 1:
        return f"{floor(fraction * 1e6) / 1e4:.4f} %"
    return f"{fraction * 100:.1f} %" if fraction < 1 else "100 %"


def times(ratio: float) -> str:
    """Return a ratio with three digits: 1.43x, 12.1x."""
    return f"{_three_digits(ratio)}x"


def interval(low: float, high: float) -> str:
    """Return the ends of an interval of ratios, as ``times`` writes them: 1.40 to 1.46."""
    return f"{_three_digits(low)} to {_three_digits(high)}"


def decibels(level: float) -> str:
    """Return a signal-to-noise ratio without decimals: 31; 1.0 where it is small, ∞ where next to nothing is lost."""
    if level > 99:
        return "∞"
    return f"{level:.0f}" if abs(level) >= 9.95 else f"{level:.1f}"


def shape(sizes: Sequence[int]) -> str:
    """Return a shape as the command line takes it: 1x3x224x224."""
    return "x".join(map(str, sizes)) or "scalar"


def change(before: str, after: str) -> str:
    """Return ``before → after``, or one of them where they are the same."""
    return before if before == after else f"{before} → {after}"


def plural(number: int, noun: str) -> str:
    """Return ``1 site``, ``2 sites``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def alone(sites: int) -> str:
    """Return ``1 site alone``, ``2 sites, each alone``."""
    return f"{plural(sites, 'site')}, each alone" if sites > 1 else f"{plural(sites, 'site')} alone"


def _scaled(number: float | None, base: int, prefixes: Sequence[str]) -> str:
    if number is None:
        return NOTHING
    power = 0
    while number >= base and power < len(prefixes) - 1:
        number, power = number / base, power + 1
    digits = str(int(number)) if power == 0 else _three_digits(number)
    return f"{digits} {prefixes[power]}".strip()


def _three_digits(number: float) -> str:
    decimals = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{decimals}f}"


NUMBER = "right"
PLACES_SHOWN = 4
GOOD, BAD, UNSURE = "bold green", "bold red", "bold yellow"


def heading(text: str) -> Text:
    """Return a line that begins a part, with an empty line before it."""
    return Text(f"\n{text}", style="bold")


def indented(said: RenderableType, columns: int = 2) -> Padding:
    """Return what belongs to the heading above it; a text is shown as it is."""
    return Padding(Text(said) if isinstance(said, str) else said, (0, 0, 0, columns))


def table(columns: Sequence[str | tuple[str, str]], rows: Iterable[Sequence[str]]) -> Padding:
    """Return a table. A column is a title, or a title and ``NUMBER``: those are aligned right and never broken."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1))
    for column in columns:
        if isinstance(column, str):
            made.add_column(column, overflow="fold")
        else:
            made.add_column(column[0], justify="right", no_wrap=True)
    for row in rows:
        made.add_row(*map(Text, row))
    return indented(made)


def facts(pairs: Iterable[tuple[str, RenderableType]]) -> Padding:
    """Return names with their values, one below the other; pairs with an empty value are left out."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        if value != "":
            grid.add_row(name, Text(value) if isinstance(value, str) else value)
    return indented(grid)


def first(names: Sequence[str]) -> str:
    """Return the first of the names, and where all of them are."""
    more = len(names) - PLACES_SHOWN
    return ", ".join(names[:PLACES_SHOWN]) + (f" and {more} more (--json lists all)" if more > 0 else "")


def notes(lines: Iterable[str]) -> Iterable[RenderableType]:
    """Yield each line as a note to the user."""
    for line in lines:
        yield indented(Text.assemble(("note: ", "bold yellow"), line))
