"""Module paths by glob: which are meant, and what to say where none is. It knows no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase

from repfuse.errors import RepfuseError

ROOT = "(root)"
"""How people name the model itself, whose path is empty."""

SHOWN = 4


def names_of(path: str) -> Iterator[str]:
    """Yield a path and those of the modules around it, innermost first: a.b.c, a.b, a. The model is around all."""
    name = path or ROOT
    while name:
        yield name
        name = name.rpartition(".")[0]


def first_match(names: Iterable[str], globs: Iterable[str]) -> str | None:
    """Return the first glob that matches one of the names, where ``*`` stands for dots too."""
    known = list(names)
    return next((glob for glob in globs if any(fnmatchcase(name, glob) for name in known)), None)


def as_globs(globs: str | Iterable[str]) -> tuple[str, ...]:
    """Return one glob or several as several."""
    return (globs,) if isinstance(globs, str) else tuple(globs)


def check_globs(globs: Iterable[str], names: Iterable[str]) -> None:
    """Raise RepfuseError for a glob that matches none of the names."""
    known = dict.fromkeys(names)
    for glob in globs:
        if first_match(known, (glob,)) is None:
            near = get_close_matches(glob, known, SHOWN, cutoff=0.4) or list(known)[:SHOWN]
            said = f"Near are {', '.join(near)}." if near else "There are no sites."
            hint = "`repfuse inspect` lists the sites; * stands for anything, dots too."
            raise RepfuseError(f"No site matches {glob!r}.", said, hint)
