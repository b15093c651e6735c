"""How a file names the weights of its network: what stands before the names, inside them, and beside them.

The rule: a name of the network becomes the file's by putting ``prefix`` before it, and a wrapper's segments
(``_orig_mod.``) behind the path of each module that was wrapped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from repfuse.wording import listed

WRAPPERS = ("module", "_orig_mod")  # what DataParallel and AveragedModel, and torch.compile, add to the names


@dataclass(frozen=True)
class Naming:
    """``prefix`` stands before each name; ``wrapped`` are paths of modules, and the wrappers' segments behind each.

    Prefix and paths are written without wrappers, and the paths begin with the prefix; the empty one is the whole.
    ``extras`` are the entries of the state dict that belong to none of the network's names, ``copies`` the prefixes of
    other copies of the weights, which are no extras.
    """

    prefix: str = ""
    wrapped: dict[str, str] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    copies: tuple[str, ...] = ()

    def in_file(self, name: str) -> str:
        """Return what the file calls the network's ``name``."""
        return insert(self.prefix + name, self.wrapped)

    def of_network(self, state: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Return the file's entries by the network's names, with the versions of its modules and without the rest."""
        wrappers = {segment for added in self.wrapped.values() for segment in added.split(".")}
        bare = OrderedDict((without(name, wrappers), held) for name, held in state.items())
        cut = len(self.prefix)
        found = OrderedDict((name[cut:], held) for name, held in bare.items() if name.startswith(self.prefix))
        versions = {_dotted(without(path, wrappers)): held for path, held in getattr(state, "_metadata", {}).items()}
        if versions:
            kept = ((path[cut:-1], held) for path, held in versions.items() if path.startswith(self.prefix))
            vars(found)["_metadata"] = OrderedDict(kept)
        return found

    def of_file(self, state: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Return the network's ``state`` by the file's names and with the extras: the inverse of ``of_network``."""
        named = OrderedDict((self.in_file(name), held) for name, held in state.items())
        named.update(self.extras)
        if versions := getattr(state, "_metadata", None):
            kept = ((self.in_file(_dotted(path))[:-1], held) for path, held in versions.items())
            vars(named)["_metadata"] = OrderedDict(kept)
        return named

    def notes(self) -> tuple[str, ...]:
        """Return what the user must be told."""
        said, before = [], self.in_file("")
        if before:
            said.append(f"took the prefix {before!r} off the names of the weights")
        inner = [path[len(self.prefix) :] for path in self.wrapped if len(path) >= len(self.prefix)]
        if inner and any(inner):
            said.append(f"took the wrapper of torch.compile or DataParallel out of the names under {listed(inner)}")
        if self.extras:
            said.append(f"kept as it is beside the network, for it is outside {before!r}: {listed(self.extras)}")
        if self.copies:
            said.append(f"left out other copies of the weights: {listed(map(repr, self.copies))}")
        return tuple(said)


def insert(name: str, wrapped: Mapping[str, str]) -> str:
    """Return ``name`` with each wrapper's segments behind its path; the empty path is before everything."""
    segments = name.split(".")
    made, path = wrapped.get("", "") + segments[0], segments[0]
    for segment in segments[1:]:
        made += "." + wrapped.get(path, "") + segment
        path += f".{segment}"
    return made


def without(name: str, wrappers: Collection[str]) -> str:
    """Return ``name`` (of a weight or a module) without the wrappers' segments."""
    if not wrappers:
        return name
    return ".".join(segment for segment in name.split(".") if segment not in wrappers)


def wrapped_in(names: Iterable[str], wrappers: Collection[str]) -> dict[str, str] | None:
    """Return where ``wrappers`` stand in the names, by the path before; None where a module is wrapped in part."""
    names, wrapped = list(names), {}
    for name in names:
        path: list[str] = []
        added = ""
        for segment in name.split("."):
            if segment in wrappers:
                added += f"{segment}."
                wrapped[".".join(path)] = added
            else:
                path.append(segment)
                added = ""
    back = all(insert(without(name, wrappers), wrapped) == name for name in names)
    return wrapped if back else None


def _dotted(path: str) -> str:
    return f"{path}." if path else ""
