"""Which values of a run lie in the same memory, and which nodes write there: as it was seen, not as names say."""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from repfuse.recording.run import Run


class Memory:
    """The memory of a run. Two values with the same storage may overlap."""

    def __init__(self, run: Run) -> None:
        self._order = {node: index for index, node in enumerate(run.nodes)}
        self._storage_of = run.storage_of
        self._writes = run.writes
        self._members: dict[int, list[fx.Node]] = defaultdict(list)
        self._writers: dict[int, list[fx.Node]] = defaultdict(list)
        for node in run.nodes:
            if node in run.storage_of:
                self._members[run.storage_of[node]].append(node)
            for storage in run.writes.get(node, ()):
                self._writers[storage].append(node)

    def of(self, node: fx.Node) -> int:
        """Return the number of the storage that a value lies in; a negative one of its own where it has none."""
        return self._storage_of.get(node, -1 - self._order[node])

    def members(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes whose values may overlap with that of ``node``, in order."""
        storages = {self._storage_of[node]} if node in self._storage_of else set()
        return [member for storage in storages | self._writes.get(node, set()) for member in self._members[storage]]

    def writers(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that write where the value of ``node`` lies, in order."""
        return self._writers.get(self._storage_of.get(node, -1), [])

    def writes(self, node: fx.Node) -> bool:
        """Whether a node writes into memory."""
        return node in self._writes

    def is_rewritten(self, node: fx.Node) -> bool:
        """Whether a tensor of the model lies there and is overwritten: its value differs from call to call."""
        return bool(self.writers(node)) and any(member.op == "get_attr" for member in self.members(node))

    def seen_later(self, writer: fx.Node) -> bool:
        """Whether what ``writer`` overwrites is read again, other than through its result, or belongs to the caller."""
        after, results = self._order[writer], {writer}
        for member in self.members(writer):
            if member.op in ("placeholder", "get_attr"):
                return True
            lies_in = self._origins(member, self._storage_of.get(member))
            if lies_in and results.issuperset(lies_in):
                results.add(member)
            if member not in results and any(self._order.get(user, after + 1) > after for user in member.users):
                return True
        return False

    def _origins(self, node: fx.Node, storage: int | None) -> list[fx.Node]:
        """Return the nodes in the same memory that a node was made from, through lists of them."""
        found = []
        for x in node.all_input_nodes:
            if x not in self._storage_of:
                found += self._origins(x, storage)
            elif self._storage_of[x] == storage:
                found.append(x)
        return found

    def written_between(self, source: fx.Node, first: fx.Node, last: fx.Node) -> bool:
        """Whether the memory of ``source`` is written after it was made and after ``first``, and before ``last``."""
        start, stop = max(self._order[first], self._order[source]), self._order[last]
        return any(start < self._order[writer] < stop for writer in self.writers(source))


def called(node: fx.Node) -> str:
    """Return the name of a method or function, ``add_`` for ``torch.ops.aten.add_.Tensor``."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return str(name).partition(".")[0]
