"""What a forward may write into beside the attributes of modules: objects that these hold, their classes and files."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from types import FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from repfuse.recording.copies import attributes

_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None)})
_WHOLE = (Tensor, nn.Module, ModuleType, type, int, float, str)
"""What is not looked into: there is nothing inside, or what is written there is seen elsewhere."""
_FOREIGN = frozenset(sys.stdlib_module_names | {"torch", "numpy"}) - {"types", "argparse"}
"""Packages whose classes and objects keep caches of their own, as loggers do."""
_DEEPEST, _MOST = 4, 1024
"""How deep what modules hold is looked into, and at how many entries of one object."""
_WARNINGS = "__warningregistry__"
"""Where Python notes of a file what it has warned of."""
_LARGE = 1 << 16
"""An array of more numbers is no counter."""


class Held:
    """What is held at one time by objects that modules hold, by the classes of modules and the files of these.

    Counters, logs and caches. What modules hold themselves is a matter of ``repfuse.recording.copies.State``.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._before: list[tuple[list[nn.Module | type], Any, list[Any]]] = []
        kinds = dict[type, None]()
        for module in modules:
            kinds[type(module)] = None
            held = [x for x in map(vars(module).__getitem__, attributes(module)) if type(x) not in _ATOMS]
            found = _objects(held, _DEEPEST) if held else ()
            self._before += (([module], *each) for each in found if not _is_watched(each[0], held))
        files: dict[int, list[nn.Module | type]] = {}
        for kind in kinds:
            own = [base for base in kind.__mro__ if _is_own(base)]
            functions = [x for base in own for x in vars(base).values() if isinstance(x, FunctionType)]
            self._before += (([kind], *each) for each in _objects([*functions, *map(vars, own)], 1))
            for names in {id(function.__globals__): function.__globals__ for function in functions}.values():
                if id(names) not in files:  # most classes of a network are of a few files, and these are long
                    files[id(names)] = []
                    self._before += ((files[id(names)], *each) for each in _objects([names], 1))
                files[id(names)].append(kind)

    def changed(self) -> set[nn.Module | type]:
        """Return the modules and classes of which something is another one now."""
        changed = (holders for holders, x, before in self._before if not _same(before, _entries(x)))
        return {holder for holders in changed for holder in holders}


def _is_watched(x: Any, attributes: list[Any]) -> bool:
    return type(x) in (list, dict, set) and any(x is held for held in attributes)


def _is_own(kind: type) -> bool:
    return str(kind.__module__).partition(".")[0] not in _FOREIGN


def _objects(values: list[Any], deepest: int) -> Iterator[tuple[Any, list[Any]]]:
    """Yield the objects among values, and in them, that can be written into, each with what it holds."""
    left, seen = [(x, 0) for x in values], set[int]()
    for x, depth in left:  # which grows
        if type(x) in _ATOMS or isinstance(x, _WHOLE) or id(x) in seen:
            continue
        seen.add(id(x))
        entries = _entries(x)
        if type(x) is not tuple:  # one that holds nothing yet may be given something
            yield x, entries
        if depth < deepest:
            left += ((entry, depth + 1) for entry in entries)


def _entries(x: Any) -> list[Any]:
    """Return what an object holds, as far as it may hold something else later."""
    if isinstance(x, dict | MappingProxyType):
        values = [value for key, value in islice(x.items(), _MOST) if key != _WARNINGS]
        return [*values, len(x) - (_WARNINGS in x)]
    if isinstance(x, list | tuple | set | deque):
        return [len(x), *islice(x, _MOST)]
    if isinstance(x, np.ndarray):
        return [x.tobytes() if x.size <= _LARGE else None]
    if isinstance(x, FunctionType):
        cells = []
        for cell in x.__closure__ or ():
            with suppress(ValueError):  # nothing is in it yet
                cells.append(cell.cell_contents)
        return [*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values(), *cells, *vars(x).values()]
    if isinstance(x, MethodType | partial):
        return [x.func, *x.args] if isinstance(x, partial) else [x.__func__]
    return list(vars(x).values()) if hasattr(x, "__dict__") and _is_own(type(x)) else []


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        a is b or (type(a) in _ATOMS and type(a) is type(b) and a == b) for a, b in zip(one, other, strict=True)
    )
