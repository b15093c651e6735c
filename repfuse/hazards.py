"""Writes in place, seen from the graph: a graph says who reads a value, not that its memory was changed in between."""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from repfuse.ops import Meaning, may_view, writes_in_place
from repfuse.ops.meaning import Same
from repfuse.trace import Traced


class Hazards:
    """Which nodes share memory, and which of them write into it."""

    def __init__(self, traced: Traced, meanings: dict[fx.Node, Meaning | None]) -> None:
        self.order = traced.order
        self.writers = {
            node for node in self.order if _tensor_input(node) is not None and writes_in_place(node, traced.module)
        }
        self._parent = {node: self._memory_of(node, meanings.get(node)) for node in self.order}
        self._root: dict[fx.Node, fx.Node] = {}
        self._group: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.order:
            parent = self._parent[node]
            self._root[node] = node if parent is None else self._root[parent]
            self._group[self._root[node]].append(node)
        self._writes: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for writer in self.writers:
            self._writes[self._root[writer]].append(writer)

    def _memory_of(self, node: fx.Node, meaning: Meaning | None) -> fx.Node | None:
        shares = isinstance(meaning, Same) or node in self.writers or may_view(node)
        return _tensor_input(node) if shares else None

    def seen_later(self, writer: fx.Node) -> bool:
        """Whether what ``writer`` overwrites is read again, other than through its result, or belongs to the caller."""
        root = self._root[writer]
        if root.op in ("placeholder", "get_attr"):
            return True
        after = self.order[writer]
        return any(
            self.order[user] > after
            for member in self._group[root]
            if not self._comes_from(member, writer)
            for user in member.users
        )

    def _comes_from(self, node: fx.Node | None, ancestor: fx.Node) -> bool:
        while node is not None:
            if node is ancestor:
                return True
            node = self._parent[node]
        return False

    def written_between(self, source: fx.Node, first: fx.Node, last: fx.Node) -> bool:
        """Whether the memory of ``source`` is written after ``first`` and before ``last``."""
        return any(
            self.order[first] < self.order[writer] < self.order[last] for writer in self._writes[self._root[source]]
        )


def _tensor_input(node: fx.Node) -> fx.Node | None:
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, fx.Node) else None
