"""Assignments, ``t[index] = value`` and ``t.data = value``, as functions, so that a graph can record them."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx


def assigned(t: Tensor, index: Any, value: Any) -> Tensor:
    """Write ``value`` into ``t[index]``, in place, and return ``t``.

    Python's statement has no result, so what is read after it would not depend on it in a graph; this has one.
    """
    t[index] = value
    return t


def lower(graph: fx.Graph, args: tuple[Any, ...]) -> fx.Node:
    """Append ``assigned(*args)`` in Python's own operators to a graph that has to run without repfuse.

    ``args`` are the nodes (and numbers) of ``graph`` that stand for ``t, index, value``. The node that is returned is
    a view of the whole of ``t``, made after the write.
    """
    graph.call_function(operator.setitem, args)
    whole: Any = (args[0], Ellipsis)
    return graph.call_function(operator.getitem, whole)


def set_data(t: Tensor, value: Tensor) -> Tensor:
    """Let ``t`` hold the numbers of ``value``, and return it."""
    t.data = value
    return t
