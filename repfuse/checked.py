"""Checks of data that anybody may have written: each says what is wrong by its place, or returns what it checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any
from unicodedata import category

Read = Callable[[Any, str], Any]
"""Takes a value and the name of its place in the data, and returns it as it is to be held."""


class NotAPlan(ValueError):
    """A value is not what stands at this place of a plan."""


def shown(value: Any) -> str:
    """Return so much of a value as fits in a message."""
    if isinstance(value, dict | list):
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
    text = repr(value[:40] if isinstance(value, str) else value)
    return text if len(text) <= 50 else f"{text[:50]}..."


def text(value: Any, where: str) -> str:
    """Check a text that can be shown: one with control characters or halves of characters cannot."""
    if not isinstance(value, str):
        raise NotAPlan(f"{where} is {shown(value)} and not a text")
    if any(category(c) in ("Cc", "Cs") and c not in "\t\n" for c in value):
        raise NotAPlan(f"{where} has characters that cannot be shown: {shown(value)}")
    return value


def count(value: Any, where: str) -> int:
    """Check a whole number that is not negative and fits into a machine."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise NotAPlan(f"{where} is {shown(value)} and not a number of things")
    return value


def flag(value: Any, where: str) -> bool:
    """Check a yes or no."""
    if not isinstance(value, bool):
        raise NotAPlan(f"{where} is {shown(value)}, neither true nor false")
    return value


def one_of(known: Collection[str]) -> Read:
    """Check a text that is one of a few."""

    def read(value: Any, where: str) -> str:
        if text(value, where) not in known:
            raise NotAPlan(f"{where} is {shown(value)}, which this version of repfuse does not know")
        return str(value)

    return read


def list_of(inner: Read) -> Read:
    """Check a list, which becomes a tuple."""

    def read(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise NotAPlan(f"{where} is {shown(value)} and not a list")
        return tuple(inner(item, f"{where}[{index}]") for index, item in enumerate(value))

    return read


def optional(inner: Read) -> Read:
    """Check a value that may be none."""
    return lambda value, where: None if value is None else inner(value, where)


def record(make: Callable[..., Any], fields: Mapping[str, Read], beside: Collection[str] = ()) -> Read:
    """Check a mapping with just these ``fields``, and those ``beside`` that are not read, and ``make`` it."""

    def read(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise NotAPlan(f"{where} is {shown(value)} and not a mapping")
        if missing := fields.keys() - value.keys():
            raise NotAPlan(f"{where} has no {min(missing)!r}")
        if unknown := value.keys() - fields.keys() - set(beside):
            raise NotAPlan(f"{where} has {shown(min(map(str, unknown)))}, which does not belong there")
        return make(**{name: inner(value[name], f"{where}.{name}") for name, inner in fields.items()})

    return read
