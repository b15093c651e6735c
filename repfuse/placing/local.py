"""The graph of one module's forward, cut out of the graph of the whole model, with some regions replaced.

Children that take no part in the replacement stay calls of themselves; those that do are dissolved into the graph.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import map_arg

from repfuse.algebra.geometry import NotAffine
from repfuse.planning.bystanders import Bystanders
from repfuse.tracing.assignment import assigned, lower
from repfuse.tracing.trace import Traced
from repfuse.tracing.tracer import Call


@dataclass(frozen=True)
class Part:
    """One addend of a replacement: ``factor`` times a value, or, with ``module``, that module's answer to the value."""

    source: fx.Node
    module: str | None
    factor: float = 1.0


@dataclass(frozen=True)
class Replacement:
    """``root`` is to be computed as the sum of ``parts``; ``nodes`` are no longer needed.

    It stands where ``root`` stood: ``after`` are no-ops on it, among ``nodes``, and between them and it a source may be
    overwritten.
    """

    root: fx.Node
    parts: tuple[Part, ...]
    nodes: frozenset[fx.Node]
    after: tuple[fx.Node, ...] = ()


Origin = Callable[[fx.Node], fx.Node]


def local_graph(
    traced: Traced, call: Call, replacements: list[Replacement], bystanders: Bystanders, origin: Origin
) -> fx.Graph:
    """Return the graph of ``call`` with the replacements made; targets are relative to the called module.

    ``origin`` gives the node whose value a node passes on unchanged: a source is often known here under another name.
    Raises NotAffine where the module cannot be written as a graph of its own.
    """
    return _Builder(traced, call, replacements, bystanders, origin).build()


class _Builder:
    def __init__(
        self, traced: Traced, call: Call, replacements: list[Replacement], bystanders: Bystanders, origin: Origin
    ) -> None:
        self.traced = traced
        self.origin = origin
        self.call = call
        self.prefix = f"{call.path}." if call.path else ""
        self.by_root = {replacement.root: replacement for replacement in replacements}
        self.gone = vanishing(traced, call, replacements, bystanders)
        self.dissolved = {above for node in self.gone - bystanders.ghosts for above in traced.call_of[node].up_to(call)}
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}

    def build(self) -> fx.Graph:
        self._placeholders()
        if not _is_plain(self.call.output):
            raise NotAffine("structured-arguments", "forward returns an object of its own kind")
        done: set[Call] = set()
        for node in self.traced.nodes[self.call.start : self.call.stop]:
            unit = self._unit(node)
            if node in self.by_root:
                self.env |= dict.fromkeys((node, *self.by_root[node].after), self._sum(self.by_root[node]))
            elif node in self.gone or node.op in ("placeholder", "output"):
                continue
            elif unit is None:
                self._copy(node)
            elif unit not in done:
                done.add(unit)
                self._call(unit)
        self.graph.output(map_arg(self.call.output, self._known))
        return self.graph

    def _unit(self, node: fx.Node) -> Call | None:
        """Return the outermost call below this one that holds ``node`` and is not dissolved."""
        inside = [above for above in self.traced.call_of[node].up_to(self.call) if above not in self.dissolved]
        return inside[-1] if inside else None

    def _placeholders(self) -> None:
        module = self.traced.module.get_submodule(self.call.path)
        parameters = inspect.signature(module.forward).parameters
        names = list(parameters)
        given = dict(zip(names, self.call.args, strict=False)) | self.call.kwargs
        if len(self.call.args) > len(names) or not set(given) <= set(names):
            raise NotAffine("structured-arguments", "forward takes a variable number of arguments")
        for name in (name for name in names if name in given):
            # Where a default stands, only parameters with defaults follow.
            node = self.graph.placeholder(name, default_value=parameters[name].default)
            if isinstance(given[name], fx.Node):
                self.env[given[name]] = node
            elif _holds_nodes(given[name]):
                raise NotAffine("structured-arguments", f"forward takes tensors inside its argument {name!r}")

    def _sum(self, replacement: Replacement) -> fx.Node:
        """Return the sum; what is subtracted comes after what is added."""
        first, *rest = sorted(replacement.parts, key=lambda part: part.factor == -1)
        total = self._scaled(self._value(first), first.factor)
        for part in rest:
            value = self._value(part)
            if part.factor == -1:
                total = self.graph.call_function(operator.sub, (total, value))
            else:
                total = self.graph.call_function(operator.add, (total, self._scaled(value, part.factor)))
        return total

    def _value(self, part: Part) -> fx.Node:
        source = self._source(part.source)
        return source if part.module is None else self.graph.call_module(part.module, (source,))

    def _scaled(self, value: fx.Node, factor: float) -> fx.Node:
        return value if factor == 1 else self.graph.call_function(operator.mul, (value, factor))

    def _copy(self, node: fx.Node) -> None:
        if node.op in ("call_module", "get_attr"):
            self._relative(str(node.target))
        if node.target is assigned:
            self.env[node] = lower(self.graph, map_arg(node.args, self._known))
            return
        copied = self.graph.node_copy(node, self._known)
        if node.op in ("call_module", "get_attr"):
            copied.target = self._relative(str(node.target))
        self.env[node] = copied

    def _call(self, unit: Call) -> None:
        args, kwargs = map_arg(unit.args, self._known), map_arg(unit.kwargs, self._known)
        result = self.graph.call_module(self._relative(unit.path), args, kwargs)
        for node, take in _leaves(unit.output):
            if node is not None and node not in self.env:
                self.env[node] = take(self.graph, result)

    def _relative(self, path: str) -> str:
        if not path.startswith(self.prefix):
            raise NotAffine("outer-reference", f"the forward of {self.call.path!r} uses {path!r} from outside")
        return path.removeprefix(self.prefix)

    def _source(self, node: fx.Node) -> fx.Node:
        alias = next((known for known in self.env if self.origin(known) is node), node)
        return self._known(node if node in self.env else alias)

    def _known(self, node: fx.Node) -> fx.Node:
        if node not in self.env:
            raise NotAffine("outer-reference", f"{self.call.path!r} uses a value that it is not given: {node.name}")
        return self.env[node]


def vanishing(traced: Traced, call: Call, replacements: list[Replacement], bystanders: Bystanders) -> set[fx.Node]:
    """Return every node of the call that the replacements make superfluous, with the helpers that only they read."""
    inside = traced.nodes[call.start : call.stop]
    gone = set(bystanders.ghosts.intersection(inside)).union(*(replacement.nodes for replacement in replacements))
    sources = {part.source for replacement in replacements for part in replacement.parts}
    seen: set[fx.Node] = set()
    while True:
        unread = _unread(inside, gone, bystanders, sources | seen)
        more = {node for node in unread.intersection(bystanders.written) if not _unseen(node, unread, bystanders)}
        if not more:
            return unread
        seen |= more


def _unread(inside: list[fx.Node], gone: set[fx.Node], bystanders: Bystanders, stay: set[fx.Node]) -> set[fx.Node]:
    """Return what is gone with the helpers that nothing else reads, except for those that ``stay``."""
    found = set(gone)
    for node in reversed(inside):
        needed = bool(node.users) or node in bystanders.written
        if node in bystanders.helpers and node not in stay and needed and found.issuperset(node.users):
            found.add(node)
    return found


def _unseen(writer: fx.Node, gone: set[fx.Node], bystanders: Bystanders) -> bool:
    """Whether nothing that stays reads the memory that the writer changes."""
    return all(member.op != "get_attr" and gone.issuperset(member.users) for member in bystanders.written[writer])


def _holds_nodes(value: Any) -> bool:
    found: list[fx.Node] = []
    map_arg(value, found.append)
    return bool(found)


def _is_plain(value: Any) -> bool:
    """Whether a graph can return the value: tensors and numbers in tuples, lists and plain dicts."""
    if isinstance(value, tuple) or type(value) in (list, immutable_list):
        return all(map(_is_plain, value))
    if type(value) in (dict, immutable_dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, fx.Node | bool | int | float | str | None)


Take = Callable[[fx.Graph, fx.Node], fx.Node]


def _leaves(value: Any, take: Take = lambda _graph, result: result) -> Iterator[tuple[fx.Node | None, Take]]:
    """Yield the nodes in a result with how to take each out of it."""
    if isinstance(value, fx.Node):
        yield value, take
    elif isinstance(value, tuple | list | dict):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):

            def inner(graph: fx.Graph, result: fx.Node, key: Any = key, outer: Take = take) -> fx.Node:
                return graph.call_function(operator.getitem, (outer(graph, result), key))

            yield from _leaves(entry, inner)
