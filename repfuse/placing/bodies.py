"""The new body of a block: what it is made of, and how its parts are called."""

from __future__ import annotations

import itertools
import re

from torch import fx, nn

from repfuse.algebra.geometry import NotAffine

_RESERVED = frozenset(dir(fx.GraphModule)) - frozenset(dir(nn.Module))


def check_names(graph: fx.Graph) -> None:
    """Raise NotAffine where a child is called like a member of every GraphModule: ``graph``, ``code``."""
    for node in graph.nodes:
        name = str(node.target).partition(".")[0]
        if node.op in ("call_module", "get_attr") and name in _RESERVED:
            raise NotAffine("reserved-name", f"a child is called {name!r}")


def steps_of(graph: fx.Graph) -> tuple[str, ...] | None:
    """Return the modules that the graph is in a row, if it is: distinct direct children, each fed by the last."""
    value, *rest = graph.nodes
    if value.op != "placeholder":
        return None
    names: list[str] = []
    for node in rest[:-1]:
        if node.op != "call_module" or node.args != (value,) or node.kwargs or "." in str(node.target):
            return None
        names.append(str(node.target))
        value = node
    return tuple(names) if rest[-1].args == (value,) and len(set(names)) == len(names) else None


_SLOT = re.compile(r"reparam|fused|deploy|merged")
"""How authors call the attribute that holds the convolution of a converted block."""


def fused_names(module: nn.Module, count: int) -> tuple[str, ...]:
    """Name the new convolutions of a block: as its own forward calls the converted one, where it knows of one."""
    code = getattr(type(module).forward, "__code__", None)
    slots = [name for name in (code.co_names if code else ()) if _SLOT.search(name)]
    free = [name for name in slots if getattr(module, name, None) is None]
    if count == 1 and free:
        return (free[0],)
    names = (f"fused_{index}" if index else "fused" for index in itertools.count())
    return tuple(itertools.islice((name for name in names if not hasattr(module, name)), count))
