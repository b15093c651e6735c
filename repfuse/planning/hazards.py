"""Writes in place, seen from the graph: a graph says who reads a value, not that its memory was changed in between."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import fx

from repfuse.ops import Meaning, shared_by, written_by
from repfuse.ops.meaning import Same
from repfuse.tracing.trace import Traced


class Hazards:
    """Which nodes may share memory, and which of them write into it."""

    def __init__(self, traced: Traced, meanings: dict[fx.Node, Meaning | None]) -> None:
        self.order = traced.order
        self._lies_in: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._memory: dict[fx.Node, set[fx.Node]] = {}
        for node in self.order:
            shared = shared_by(node, traced.module, traced.opaque)
            meaning = meanings.get(node)
            self._lies_in[node] = (*shared, meaning.input) if isinstance(meaning, Same) else shared
            self._join(node, self._lies_in[node])
        self._writes: dict[int, list[fx.Node]] = defaultdict(list)
        for node in self.order:
            for memory in {id(self._memory[target]) for target in written_by(node, traced.module, traced.opaque)}:
                self._writes[memory].append(node)

    def _join(self, node: fx.Node, others: Iterable[fx.Node]) -> None:
        """Put ``node`` into one memory with ``others``, and those with each other."""
        joined = {node}.union(*(self._memory[other] for other in others))
        self._memory |= dict.fromkeys(joined, joined)

    def seen_later(self, writer: fx.Node) -> bool:
        """Whether what ``writer`` overwrites is read again, other than through its result, or belongs to the caller."""
        after, results = self.order[writer], {writer}
        for member in sorted(self._memory[writer], key=self.order.__getitem__):
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
        return any(start < self.order[writer] < stop for writer in self._writes[id(self._memory[source])])
