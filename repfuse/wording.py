"""Pieces that many messages are made of. It knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

Progress = Callable[[str, float], None]
"""How long work says how far it is: it is told the stage, and the fraction of the whole that is done."""

SHOWN = 6
LINE = 200


def listed(names: Iterable[object], most: int = SHOWN) -> str:
    """Return the first of the names, and how many more there are."""
    known = list(map(str, names))
    more = f", and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more


def dtype_name(dtype: object) -> str:
    """Return the name of one of torch's dtypes: float32."""
    return str(dtype).removeprefix("torch.")


def printable(text: str) -> str:
    """Return a text in which what cannot be seen is shown as its escape: control characters, or what turns the
    direction of the text after it.
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def small(number: float) -> str:
    """Return an error with two digits: 0, 4.2e-16."""
    return "0" if number == 0 else f"{number:.1e}"


def apart(error: float, limit: float, text: Callable[[float], str] = small) -> tuple[str, str]:
    """Return an error and its limit as text, with more digits where it is larger and would read the same."""
    digits, told = 2, (text(error), text(limit))
    while error > limit and told[0] == told[1]:
        told, digits = (f"{error:.{digits}e}", f"{limit:.{digits}e}"), digits + 1
    return told


def first_line(error: BaseException) -> str:
    """Return the beginning of an error's text; its class, where it has no text."""
    return str(error).strip().split("\n")[0][:LINE] or type(error).__name__


def described(error: BaseException) -> str:
    """Return the class of an error and the beginning of its text: ``ValueError: it is negative``."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"
