"""JSON that anybody may have written: with a limit to its size, and each name once in its place. It knows no torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def read_json(path: Path, largest: int) -> Any:
    """Return the JSON in a file of at most ``largest`` bytes. Raises ValueError where it is none, OSError of a disk."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")  # a pipe would wait
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it is larger than {largest >> 20} MiB")
    return parse_json(content)


def parse_json(content: bytes | str) -> Any:
    """Return what JSON text says. Raises ValueError where it is none, or where two readers might differ on it."""
    try:
        return json.loads(content, object_pairs_hook=_mapping, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ValueError("it is no text") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for name, value in pairs:
        if name in mapping:
            raise ValueError(f"{name[:40]!r} stands twice in one place")
        mapping[name] = value
    return mapping


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")
