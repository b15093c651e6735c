"""How things are said: pieces that many messages are made of, and results as JSON-ready data. It knows no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

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


# Result dataclasses as JSON-ready data.


def json_ready(value: Any) -> Any:
    """Return ``value`` as dicts, lists, strings, numbers, booleans and None.

    A dataclass says by ``to_dict`` what it becomes, and without one it is its fields. JSON has no number for infinity
    or "not a number": they become the strings ``"inf"``, ``"-inf"`` and ``"nan"``.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return value.to_dict() if hasattr(value, "to_dict") else by_field(value)
    if isinstance(value, dict):
        return {str(key): json_ready(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [json_ready(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def by_field(value: Any) -> dict[str, Any]:
    """Return a dataclass as what its fields become, the properties in its ``ALSO`` first; not what its repr hides."""
    names = (*getattr(value, "ALSO", ()), *(field.name for field in fields(value) if field.repr))
    return {name: json_ready(getattr(value, name)) for name in names}


class Result:
    """A dataclass that says what it is as JSON; ``ALSO`` names the properties that readers want beside its fields."""

    ALSO: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return by_field(self)
