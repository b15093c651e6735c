"""Values that a network computes from parameters and buffers alone: weights in all but name.

A node is constant if everything that its value depends on is: the nodes it reads and, where its memory was written in
place before it was made, the writers and what they read. A tensor of the model that any node overwrites is not, and
neither is what draws random numbers: that was watched while it ran, not guessed from names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from repfuse.networks import named_tensors
from repfuse.recording.run import Run, assigned, set_data, unknown

if TYPE_CHECKING:
    from repfuse.recording.recording import Recording


# Which values of a run lie in the same memory, and which nodes write there: as it was seen, not as names say.


class Memory:
    """The memory of a run, whose nodes are in this ``order``. Two values with the same storage may overlap."""

    def __init__(self, run: Run) -> None:
        self.order = {node: index for index, node in enumerate(run.nodes)}
        self._storage_of = run.storage_of
        self._writes = run.writes
        self._dtype_of = run.dtype_of
        self._members: dict[int, list[fx.Node]] = defaultdict(list)
        self._writers: dict[int, list[fx.Node]] = defaultdict(list)
        for node in run.nodes:
            if node in run.storage_of:
                self._members[run.storage_of[node]].append(node)
            for storage in run.writes.get(node, ()):
                self._writers[storage].append(node)

    def of(self, node: fx.Node) -> int:
        """Return the number of the storage that a value lies in; a negative one of its own where it has none."""
        return self._storage_of.get(node, -1 - self.order[node])

    def members(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes whose values may overlap with that of ``node``, in order."""
        storages = {self._storage_of[node]} if node in self._storage_of else set()
        return [member for storage in storages | self._writes.get(node, set()) for member in self._members[storage]]

    def writers(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that write where the value of ``node`` lies, in order."""
        return self._writers.get(self._storage_of.get(node, -1), []) if self._writers else []

    def writes(self, node: fx.Node) -> bool:
        """Whether a node writes into memory."""
        return node in self._writes

    def is_rewritten(self, node: fx.Node) -> bool:
        """Whether a tensor of the model lies there and is overwritten: its value differs from call to call.

        Unless it was overwritten as a whole before, and never after that.
        """
        written = bool(self.writers(node)) and any(member.op == "get_attr" for member in self.members(node))
        return written and self.put(node) is None

    def put(self, node: fx.Node) -> fx.Node | None:
        """Return the node that put its last argument where a tensor of the model was, if it is the value of ``node``:
        ``x.data = value``, ``x.copy_(value)``, ``x[:] = value``.
        """
        if not self._writes:
            return None
        put = node if node.target is set_data else self._copied(node)
        source = None if put is None else put.args[-1]
        if put is None or not isinstance(source, fx.Node) or self._dtype_of.get(source) != self._dtype_of[put]:
            return None
        later = (self.order[writer] > self.order[put] for writer in self.writers(source))
        return None if any(later) else put

    def _copied(self, node: fx.Node) -> fx.Node | None:
        """Return the one copy into a whole tensor of the model that ``node`` reads after it, or is."""
        writers = self.writers(node)
        if len(writers) != 1 or not _is_copy(writers[0]):
            return None
        (writer,) = writers
        target: Any = writer.args[0]
        while isinstance(target, fx.Node) and (called(target) == "detach" or target.target is getattr):
            target = target.args[0]
        whole = isinstance(target, fx.Node) and target.op == "get_attr"
        reads = whole and node.op == "get_attr" and node.target == target.target
        after = reads and self.order[writer] < self.order[node]
        return writer if after or (whole and node is writer) else None

    def read_by(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that the value of a node depends on."""
        put = self.put(node)
        return node.all_input_nodes if put is None else [x for x in put.all_input_nodes if x is put.args[-1]]

    def seen_later(self, writer: fx.Node) -> bool:
        """Whether what ``writer`` overwrites is read again, other than through its result, or belongs to the caller."""
        after, results = self.order[writer], {writer}
        for member in self.members(writer):
            if member.op in ("placeholder", "get_attr"):
                return True
            lies_in = self._origins(member, self._storage_of.get(member))
            if lies_in and results.issuperset(lies_in):
                results.add(member)
            if member not in results and any(self.order.get(user, after + 1) > after for user in member.users):
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

    def written_between(self, source: fx.Node, first: fx.Node, last: fx.Node, but: Collection[fx.Node] = ()) -> bool:
        """Whether another than ``but`` these writes the memory of ``source`` after it was made and after ``first``, and
        before ``last``.
        """
        start, stop = max(self.order[first], self.order[source]), self.order[last]
        return any(start < self.order[writer] < stop and writer not in but for writer in self.writers(source))


def _is_copy(writer: fx.Node) -> bool:
    if writer.target is assigned:
        index: Any = writer.args[1]
        parts = index if isinstance(index, tuple) else (index,)
        return all(map(takes_all, parts))
    return called(writer) == "copy_" and len(writer.args) == 2


def takes_all(entry: Any) -> bool:
    """Whether an entry of an index takes whole axes: ``:``, ``...``."""
    return entry is Ellipsis or (type(entry) is slice and entry == slice(None))  # an array equals nothing as a whole


def called(node: fx.Node) -> str:
    """Return the name of a method or function, ``add_`` for ``torch.ops.aten.add_.Tensor``."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return str(name).partition(".")[0]


class Constants:
    """The constants of one recording."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.module = recording.module
        self._memory = recording.memory
        self._pure: set[fx.Node] = set()
        self._by_name: dict[str, fx.Node] = {}
        self._name = cache(self._name_anew)
        self._leaves = cache(self._leaves_of)
        self.asked: set[str] = set()

    def settle(self) -> None:
        """Find the constants anew, by the marks that the recording has now."""
        self._pure.clear()
        self._name.cache_clear()
        for node in self.recording.nodes:
            if self._is_pure(node):
                self._pure.add(node)

    def _is_pure(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return str(node.target) not in self.recording.run.replaced and self.recording.mark_of(node) is None
        if node in self.recording.run.attribute_of:
            return True
        if not node.op.startswith("call_") or node.target is unknown or called(node) in _UNSET:
            return False
        if node in self.recording.run.random or (node.target is set_data and self._memory.put(node) is None):
            return False
        inputs = self._memory.read_by(node)
        if not self._pure.issuperset(inputs) or self.recording.mark_of(node) is not None:
            return False
        return all(self.recording.between(x, node) is None for x in inputs)

    def name_of(self, value: Any) -> str | None:
        """Return the name of a node's value, if it is a tensor or number computed from parameters and buffers alone.

        ``block.weight`` for a tensor of the model as it is, ``%mul_3`` (the node's name) for a computed one. The value
        is the same for all who read the node.
        """
        return self._name(value) if isinstance(value, fx.Node) else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a value that ``name_of`` named, or of a parameter or buffer."""
        node = self._by_name.get(name)
        return tuple(self.tensors[name].shape) if node is None else self.recording.shape_of.get(node, ())

    def leaves(self, name: str) -> tuple[str, ...]:
        """Return the names of the parameters and buffers that the value is computed from, each once."""
        node = self._by_name.get(name)
        return (name,) if node is None else self._leaves(node)

    def _leaves_of(self, node: fx.Node) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(step.target) for step in self._steps(node) if self._is_stored(step)))

    def floating_leaves(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return which parameters and buffers of floating dtype the values are computed from."""
        leaves = dict.fromkeys(leaf for name in names for leaf in self.leaves(name))
        return tuple(leaf for leaf in leaves if self.tensors[leaf].is_floating_point())

    def is_computed(self, name: str) -> bool:
        """Whether the value is computed in every forward, and no parameter or buffer as it is."""
        node = self._by_name.get(name)
        return node is not None and not self._is_stored(node)

    def written(self, names: Iterable[str]) -> Iterator[fx.Node]:
        """Yield the nodes that put one of these values where a tensor of the model was."""
        nodes = (self._by_name.get(name) for name in names)
        found = (self._memory.put(node) for node in nodes if node is not None)
        return (node for node in found if node is not None)

    def evaluate(self, name: str, tensors: Callable[[str], Tensor]) -> Tensor:
        """Return the value, computed in float64 from the parameters and buffers that ``tensors`` gives by name.

        Where the graph itself says another dtype (``.float()``), it keeps that. The result may be a tensor of
        ``tensors`` or a view of one: it is not to be written into.
        """
        node = self._by_name.get(name)
        if node is None:
            return widened(tensors(name))
        with torch.no_grad():
            value = self._run(self._steps(node), lambda leaf: widened(tensors(leaf)))
            return torch.as_tensor(value[node])

    def numbers(self, name: str) -> Any:
        """Return the integers that a value holds, as lists: what is made of them holds for these weights alone."""
        self.asked.add(name)
        return self.evaluate(name, self.tensors.__getitem__).tolist()

    def _name_anew(self, node: fx.Node) -> str | None:
        if node not in self.recording.shape_of or not self._is_steady(node):
            return None
        name = str(node.target) if self._is_stored(node) else f"%{node.name}"
        self._by_name[name] = node
        return name

    def is_constant(self, node: fx.Node) -> bool:
        """Whether the value is constant, as it is when the node was made."""
        if node not in self._pure:
            return False
        steps = self._steps(node)
        return self._pure.issuperset(steps) and not any(map(self._memory.is_rewritten, steps))

    def _is_steady(self, node: fx.Node) -> bool:
        """Whether the value is constant and no reader of the node sees it changed in place."""
        if not self.is_constant(node):
            return False
        order = self.recording.order
        last_use = max((order.get(user, len(order)) for user in node.users), default=0)
        return not any(order[node] < order[writer] < last_use for writer in self._memory.writers(node))

    def _steps(self, node: fx.Node) -> list[fx.Node]:
        """Return all that has to run for the value of ``node`` as it is when that was made, in order."""
        if node.op == "get_attr" and not self._memory.writers(node):
            return [node]
        order = self.recording.order
        end, found, pending = order[node], set[fx.Node](), [node]
        while pending:
            step = pending.pop()
            if step in found:
                continue
            found.add(step)
            if step in self.recording.run.attribute_of:
                continue
            pending += self._memory.read_by(step)
            if self._memory.put(step) is None:
                pending += [writer for writer in self._memory.writers(step) if order[writer] <= end]
        return sorted(found, key=order.__getitem__)

    def _is_stored(self, node: fx.Node) -> bool:
        return node.op == "get_attr" and self._memory.put(node) is None

    def _run(self, steps: Iterable[fx.Node], read: Callable[[str], Any]) -> dict[fx.Node, Any]:
        """Run nodes of a graph, in order, and return their values; ``read`` gives the tensors of the model by name.

        Floating dtypes that forward read off tensors are float64, as the tensors are.
        """
        values: dict[fx.Node, Any] = {}
        attributes = self.recording.run.attribute_of
        for step in steps:
            if self._memory.put(step) is not None:
                (value,) = map(values.__getitem__, self._memory.read_by(step))
                values[step] = value.expand(self.recording.shape_of[step])
            elif step in attributes:
                kind = attributes[step]
                floating = isinstance(kind, torch.dtype) and kind.is_floating_point
                values[step] = torch.float64 if floating else kind
            else:
                values[step] = _result(step, values, read)
        return values

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the module by each of their names."""
        return dict(named_tensors(self.module, remove_duplicate=False))


_UNSET = frozenset({"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty_strided", "resize_", "set_"})
"""What returns memory as it finds it. Operators do so too, inside, and fill it: these are told by name."""


def widened(tensor: Tensor) -> Tensor:
    """Return the numbers in float64 (complex ones in complex128); integers as they are."""
    numeric = tensor.is_floating_point() or tensor.is_complex()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64)) if numeric else tensor


def lookup(module: nn.Module, constants: Constants) -> Callable[[str], Tensor]:
    """Return the function that gives every constant of a graph of ``module`` by name, computed ones in float64."""
    same = module is constants.module
    stored = constants.tensors if same else dict(named_tensors(module, remove_duplicate=False))

    def tensor(name: str) -> Tensor:
        found = stored.get(name)
        return (constants.evaluate(name, stored.__getitem__) if found is None else found).detach()

    return tensor


def _result(step: fx.Node, values: dict[fx.Node, Any], read: Callable[[str], Any]) -> Any:
    if step.op == "get_attr":
        return read(str(step.target))
    args, kwargs = map_arg((step.args, step.kwargs), values.__getitem__)
    if step.op == "call_method":
        return getattr(args[0], str(step.target))(*args[1:], **kwargs)
    assert callable(step.target)
    result = step.target(*args, **kwargs)
    made_of_numbers = isinstance(result, Tensor) and not step.all_input_nodes
    return widened(result) if made_of_numbers else result  # so that it takes the others, which are in float64
