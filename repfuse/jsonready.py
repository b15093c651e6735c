"""Result dataclasses as JSON-ready data."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar


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
