"""What one run of a network did, as the recorder noted it."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, fx

from repfuse.recording.sizes import Decision

# One execution of a module's forward, as a recording keeps it.


@final
@dataclass(eq=False, repr=False)
class ModuleCall:
    """A call of the module at ``path``, the ``number``-th of that module; arguments and result with nodes for tensors.

    The nodes that were made while it ran are the recording's from ``start`` to ``stop``; ``own`` are those that its own
    forward made, and the calls of modules, in order. ``lines`` gives, where the forward is a graph, the value of
    each line of that graph by its number. ``autocast`` is the state of mixed precision in which it was called.
    """

    path: str
    number: int
    caller: ModuleCall | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    start: int
    autocast: tuple[bool, bool]
    own: list[Any] = field(default_factory=list)
    lines: dict[int, fx.Node] = field(default_factory=dict)
    stop: int = 0
    output: Any = None
    decisions: tuple[Decision, ...] = ()
    asked: tuple[fx.Node, ...] = ()
    """Values whose numbers its forward asked for: it may do something else for others."""
    stored: tuple[fx.Node, ...] = ()
    """Values that its module holds since."""
    changes_state: bool = False
    """Whether its module holds something else since that is no value of the recording."""
    meets_errors: bool = False
    """Whether something that it called raised an error, also one that it caught."""
    switches: tuple[int, ...] = ()
    """After how many nodes it turned gradients on or off, each time."""
    enters_autocast: bool = False
    single: Single | None = None
    """What it did, where the class of its module says all of that, and it is one function."""

    @classmethod
    def outermost(cls, autocast: tuple[bool, bool] = (False, False)) -> ModuleCall:
        """Return the call of a network by whoever runs it."""
        return cls("", 0, None, (), {}, 0, autocast)

    def chain(self) -> Iterator[ModuleCall]:
        """Yield this call, its caller, and so on up to the root."""
        call: ModuleCall | None = self
        while call is not None:
            yield call
            call = call.caller

    def up_to(self, outer: ModuleCall) -> list[ModuleCall]:
        """Return this call and its callers below ``outer``, innermost first."""
        found = list[ModuleCall]()
        for call in self.chain():
            if call is outer:
                break
            found.append(call)
        return found


class Single(NamedTuple):
    """The one function that a call of a module of this ``kind`` did, as ``node``: of its input, which has so many axes
    and is given at ``place``, and of tensors of its ``own``, each by the place or the name of the argument.
    """

    kind: type
    node: fx.Node
    place: int
    rank: int
    own: list[tuple[int | str, str]]


# Assignments, ``t[index] = value`` and ``t.data = value``, as functions, so that a graph can record them.


def assigned(t: Tensor, index: Any, value: Any) -> Tensor:
    """Write ``value`` into ``t[index]``, in place, and return ``t``.

    Python's statement has no result, so what is read after it would not depend on it in a graph; this has one.
    """
    t[index] = value
    return t


def lower(graph: fx.Graph, args: tuple[Any, ...]) -> fx.Node:
    """Append ``assigned(*args)`` to a graph that has to run without repfuse.

    It is written as a method, since a graph that is read from a file runs on stand-ins, which take no assignment; what
    removes dead code leaves it there since it is asserted of its result that this is None, as it is.

    ``args`` are the nodes (and numbers) of ``graph`` that stand for ``t, index, value``. The node that is returned is
    a view of the whole of ``t``, made after the write.
    """
    written = graph.call_method("__setitem__", args)
    graph.call_function(torch._assert, (graph.call_function(operator.eq, (written, None)), "an assignment"))
    whole: Any = (args[0], Ellipsis)
    return graph.call_function(operator.getitem, whole)


def set_data(t: Tensor, value: Tensor) -> Tensor:
    """Let ``t`` hold the numbers of ``value``, and return it."""
    t.data = value
    return t


def unknown() -> Tensor:
    """Stand in a graph for a tensor that came from nowhere: from compiled code, or from outside of the network."""
    raise RuntimeError("a tensor that no function of torch was seen to make")


class Step:
    """An operation of a run that is only compared with another: what a node of a graph is, without the graph.

    One that ``repeats`` a call of the other run is all that is noted of that, and reads the tensors of the network
    that are read there.
    """

    __slots__ = ("all_input_nodes", "args", "kwargs", "op", "repeats", "target", "users")

    def __init__(
        self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], repeats: ModuleCall | None = None
    ) -> None:
        self.op, self.target, self.args, self.kwargs, self.repeats = op, target, args, kwargs, repeats
        self.users: dict[Step, None] = {}
        self.all_input_nodes: dict[Step, None] = {}  # each once
        if repeats is None:
            _find_steps(args, self.all_input_nodes)
            _find_steps(kwargs.values(), self.all_input_nodes)
        else:
            self.all_input_nodes.update(dict.fromkeys([x for x in args if type(x) is Step]))
        for step in self.all_input_nodes:
            step.users[self] = None


def _find_steps(values: Iterable[Any], found: dict[Step, None]) -> None:
    for value in values:
        kind = type(value)
        if kind is Step:
            found[value] = None
        elif kind is tuple or kind is list:
            _find_steps(value, found)
        elif kind is dict:
            _find_steps(value.values(), found)
        elif kind is slice:
            _find_steps((value.start, value.stop, value.step), found)


Node = Any
"""A node of the graph, or a ``Step`` where a run has none."""


class Run:
    """The graph of one run, its nodes in order, and for each the call that made it.

    ``shape_of``, ``dtype_of`` and ``storage_of`` describe the tensors: two with the same storage share memory.
    ``writes`` are the storages that a node writes into. ``size_of`` are the values of nodes that are sizes,
    ``attribute_of`` of those that are dtypes and devices; ``autocast_of`` is the state of mixed precision in which a
    node was made. ``unknown`` are tensors that came from nowhere, ``returned`` those of them that a call returned.
    ``escaping`` are values that somebody holds or reads unseen. ``of_inputs`` are nodes that depend on the inputs,
    ``random`` those that drew random numbers. ``replaced`` are names of tensors of the network in whose place others
    were put. ``last_decisions`` are those since the last operation: path and number of the call, and place in it.

    ``asks_for_sizes`` says that some forward asked for a size, or cut a part out of a tensor by itself; ``keeps`` that
    some module holds something else at the end.

    A run that is only compared with another needs no graph: its nodes are ``Step``s.
    """

    def __init__(self, *, with_graph: bool = True) -> None:
        self.graph = fx.Graph()
        self.with_graph = with_graph
        self.root = ModuleCall.outermost()
        self.nodes: list[Node] = []
        self.calls: dict[str, list[ModuleCall]] = defaultdict(list)
        self.call_of: dict[Node, ModuleCall] = {}
        self.shape_of: dict[Node, tuple[int, ...]] = {}
        self.dtype_of: dict[Node, torch.dtype] = {}
        self.storage_of: dict[Node, int] = {}
        self.writes: dict[Node, set[int]] = {}
        self.attribute_of: dict[Node, torch.dtype | torch.device] = {}
        self.size_of: dict[Node, int] = {}
        self.unknown: dict[Node, Tensor] = {}
        self.escaping: set[Node] = set()
        self.random: set[Node] = set()
        self.autocast_of: dict[Node, tuple[bool, bool]] = {}
        self.of_inputs: set[Node] = set()
        self.asks_for_sizes = self.keeps = False
        self.returned: set[Node] = set()
        self.replaced: set[str] = set()
        self.last_decisions: list[tuple[str, int, int]] = []
        self._storages_of_inputs: set[int] = set()
        self._names: dict[str, int] = {}
        """The names of nodes, and how many after each have it with a number."""

    def make(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a new node of the graph, or a step where there is to be none."""
        if not self.with_graph:
            return Step(op, target, args, kwargs)
        if not self.nodes:
            return self.graph.create_node(op, target, args, kwargs, self._name(target))
        # The graph itself would look at each argument, and long for a name: three times the work.
        node = fx.Node(self.graph, self._name(target), op, target, args, kwargs)
        self.nodes[-1].append(node)
        return node

    def _name(self, target: Any) -> str:
        """Return a name that no node has: ``mul``, ``mul_1``."""
        base = str(getattr(target, "__name__", target)).replace(".", "_")
        name, count = base, self._names.get(base, 0)
        while name in self._names:
            count += 1
            name = f"{base}_{count}"
        self._names[base], self._names[name] = count, 0
        return name

    def add(self, node: Node, call: ModuleCall) -> None:
        """Take in the next node."""
        self.nodes.append(node)
        self.last_decisions.clear()
        self.call_of[node] = call
        call.own.append(node)
        if node.op == "get_attr":
            return
        given = node.op == "placeholder" or node.target is unknown
        if given or not self.of_inputs.isdisjoint(node.all_input_nodes):
            self.of_inputs.add(node)

    def describe(self, node: Node, shape: tuple[int, ...], dtype: torch.dtype, storage: int) -> None:
        """Note what tensor a node is."""
        self.shape_of[node], self.dtype_of[node], self.storage_of[node] = shape, dtype, storage
        if storage in self._storages_of_inputs:
            self.of_inputs.add(node)

    def write(self, node: Node, storages: set[int]) -> None:
        """Note that a node writes into memory."""
        self.writes.setdefault(node, set()).update(storages)
        if node in self.of_inputs:
            self._storages_of_inputs |= storages

    def single(self, call: ModuleCall, kind: type) -> Single | None:
        """Return what a call of a module of this kind did, if that is one function and nothing else."""
        *read, node = call.own
        source = call.args[0] if len(call.args) == 1 and not call.kwargs else None
        if not (call.output is node and isinstance(node, fx.Node) and isinstance(source, fx.Node)):
            return None
        if node.op != "call_function" or any(self.autocast_of[node]):
            return None
        places: dict[fx.Node, int | str] = {x: at for at, x in enumerate(node.args) if isinstance(x, fx.Node)}
        places |= {x: name for name, x in node.kwargs.items() if isinstance(x, fx.Node)}
        place, rank, own = places.pop(source, None), len(self.shape_of.get(source, ())), list[tuple[int | str, str]]()
        for x in read:
            if type(x) is not fx.Node or x.op != "get_attr" or x not in places:
                return None
            owner, _, name = str(x.target).rpartition(".")
            if owner != call.path:
                return None
            own.append((places[x], name))
        flat = len(node.all_input_nodes) == len(places) + 1  # nothing lies in lists
        return Single(kind, node, place, rank, own) if type(place) is int and flat and len(own) == len(places) else None

    def every_call(self) -> Iterator[ModuleCall]:
        """Yield the calls of all modules."""
        return chain.from_iterable(self.calls.values())

    @property
    def meets_errors(self) -> bool:
        """Whether something raised an error that the network caught."""
        return any(call.meets_errors for call in self.every_call())

    @property
    def changes_state(self) -> bool:
        """Whether a module holds something else since."""
        return self.keeps or any(call.stored or call.changes_state for call in self.every_call())
