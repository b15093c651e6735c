"""Writes in place, seen from the graph: a graph says who reads a value, not that its memory was changed in between."""

from __future__ import annotations

from torch import fx

from repfuse.ops import Meaning
from repfuse.ops.meaning import Same
from repfuse.tracing.aliases import Aliases
from repfuse.tracing.trace import Traced


class Hazards:
    """Which nodes may share memory, and which of them write into it."""

    def __init__(self, traced: Traced, meanings: dict[fx.Node, Meaning | None]) -> None:
        self.order = traced.order
        self._aliases = Aliases()
        self._lies_in: dict[fx.Node, list[fx.Node]] = {}
        for node in self.order:
            part = traced.module.get_submodule(str(node.target)) if node.op == "call_module" else None
            meaning = meanings.get(node)
            also = (meaning.input,) if isinstance(meaning, Same) else ()
            self._lies_in[node] = self._aliases.add(node, part, traced.opaque, also=also)

    def seen_later(self, writer: fx.Node) -> bool:
        """Whether what ``writer`` overwrites is read again, other than through its result, or belongs to the caller."""
        after, results = self.order[writer], {writer}
        for member in sorted(self._aliases[writer].members, key=self.order.__getitem__):
            origins = self._lies_in[member]
            if origins and results.issuperset(origins):
                results.add(member)
            if member.op in ("placeholder", "get_attr"):
                return True
            if member not in results and any(self.order[user] > after for user in member.users):
                return True
        return False

    def written_between(self, source: fx.Node, first: fx.Node, last: fx.Node) -> bool:
        """Whether the memory of ``source`` is written after it was made and after ``first``, and before ``last``."""
        start, stop = max(self.order[first], self.order[source]), self.order[last]
        return any(start < self.order[writer] < stop for writer in self._aliases[source].writers)
