"""Which values of a growing graph may lie in the same memory, and which nodes write into it."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from torch import fx, nn

from repfuse.tracing.memory import viewed_by, written_by


@dataclass(eq=False)
class Memory:
    """The nodes whose values may overlap, and those that write there, in order."""

    members: set[fx.Node] = field(default_factory=set)
    writers: list[fx.Node] = field(default_factory=list)

    @property
    def is_rewritten(self) -> bool:
        """Whether a tensor of the model lies here and is overwritten: its value differs from call to call."""
        return bool(self.writers) and any(member.op == "get_attr" for member in self.members)


class Aliases:
    """The memory of each node. Nodes are added in the order of the graph; what is not known is on the safe side."""

    def __init__(self) -> None:
        self._memory: dict[fx.Node, Memory] = {}
        self._at: dict[int, fx.Node] = {}

    def __getitem__(self, node: fx.Node) -> Memory:
        return self._memory[node]

    def add(
        self,
        node: fx.Node,
        part: nn.Module | None = None,
        opaque: Container[str] = (),
        *,
        storage: int | None = None,
        also: Iterable[fx.Node] = (),
    ) -> list[fx.Node]:
        """Add the next node, and return the nodes that its result may lie in the memory of.

        ``part`` is the module that it calls, ``opaque`` are modules not traced through; ``storage`` says where the
        tensor lies that it reads from the model; ``also`` are nodes that are known to share its memory.
        """
        written = written_by(node, part, opaque)
        others = [*viewed_by(node, part), *written, *also]
        same = [] if storage is None else [self._at.setdefault(storage, node)]
        self._join(node, [*others, *same])
        if written:
            self._memory[node].writers.append(node)
        return others

    def _join(self, node: fx.Node, others: list[fx.Node]) -> None:
        joined = Memory({node})
        for memory in {id(m): m for m in (self._memory[other] for other in others if other is not node)}.values():
            joined.members |= memory.members
            joined.writers += memory.writers
        self._memory |= dict.fromkeys(joined.members, joined)
