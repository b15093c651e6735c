"""The graph of one module's forward, cut out of the graph of the whole model, with some regions replaced.

Children that take no part in the replacement stay calls of themselves; those that do are dissolved into the graph.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import fx
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._pytree import tree_map_only

from repfuse.algebra.geometry import Fit, Fits, NotAffine
from repfuse.ops.channels import only_measures
from repfuse.ops.table import Meanings
from repfuse.recording.run import ModuleCall, assigned, lower, set_data, unknown
from repfuse.recording.sizes import Sizes
from repfuse.recording.stock import hooks_of


@dataclass(frozen=True)
class Summand:
    """One addend of a replacement: ``factor`` times a value, or, with ``module``, that module's answer to the value.

    Other sizes than those that ``fits`` names per axis are refused, as they were.
    """

    source: fx.Node
    module: str | None
    factor: float = 1.0
    fits: tuple[Fits, ...] = ()


@dataclass(frozen=True)
class Replacement:
    """``root`` is to be computed as the sum of ``parts``, or as these joined ``along`` an axis; ``nodes`` are no longer
    needed.

    It stands where ``root`` stood: ``after`` are no-ops on it, among ``nodes``, and between them and it a source may be
    overwritten.
    """

    root: fx.Node
    parts: tuple[Summand, ...]
    nodes: frozenset[fx.Node]
    after: tuple[fx.Node, ...] = ()
    along: int | None = None


def local_graph(meanings: Meanings, call: ModuleCall, replacements: list[Replacement]) -> fx.Graph:
    """Return the graph of ``call`` with the replacements made; targets are relative to the called module.

    Raises NotAffine where the module cannot be written as a graph of its own.
    """
    module = meanings.recording.modules[call.path]
    kind = _Edited if isinstance(module, fx.GraphModule) and call.lines else _Written
    return kind(meanings, call, replacements).build()


class SizeGone(NotAffine):
    """A size of the value ``node`` is needed, which is gone, and no value that stays has it."""

    def __init__(self, node: fx.Node, name: str) -> None:
        super().__init__("outer-reference", f"a size of {name} is read, which would be gone")
        self.node = node


class _Builder:
    """What both ways to a graph share: the values that are known, and how a replacement is written."""

    def __init__(self, meanings: Meanings, call: ModuleCall, replacements: list[Replacement]) -> None:
        recording = self.recording = meanings.recording
        self.module = recording.modules[call.path]
        self.origin = meanings.origin
        self.call = call
        self.prefix = f"{call.path}." if call.path else ""
        self.by_root = {replacement.root: replacement for replacement in replacements}
        self.root_of = {node: each.root for each in replacements for node in each.nodes}
        self.gone = vanishing(meanings, call, replacements)
        replaced = self.gone - vanishing(meanings, call, [])
        self.dissolved = {above for node in replaced for above in recording.call_of[node].up_to(call)}
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self._alias: dict[fx.Node, fx.Node] = {}

    def know(self, node: fx.Node, value: Any) -> None:
        """Let a recorded value be known in the graph as ``value``."""
        self.env[node] = value
        self._alias.setdefault(self.origin(node), node)

    def _sum(self, replacement: Replacement) -> fx.Node:
        """Return the sum, or what is joined; what is subtracted comes after what is added."""
        if replacement.along is not None:
            return self.graph.call_function(torch.cat, ([*map(self._value, replacement.parts)], replacement.along))
        first, *rest = sorted(replacement.parts, key=lambda part: part.factor == -1)
        total = self._scaled(self._value(first), first.factor)
        for part in rest:
            value = self._value(part)
            if part.factor == -1:
                total = self.graph.call_function(operator.sub, (total, value))
            else:
                total = self.graph.call_function(operator.add, (total, self._scaled(value, part.factor)))
        return total

    def _value(self, part: Summand) -> fx.Node:
        source = self._known(part.source)
        for axis, fits in enumerate(part.fits):
            for fit in sorted(fits, key=repr):
                self._insist(source, axis - len(part.fits), fit)
        return source if part.module is None else self.graph.call_module(part.module, (source,))

    def _insist(self, value: fx.Node, axis: int, fit: Fit) -> None:
        """Let the graph refuse sizes that do not fit."""
        size: Any = self.graph.call_method("size", (value, axis))
        if fit.offset % fit.modulus:
            size = self.graph.call_function(operator.add, (size, fit.offset % fit.modulus))
        rest = self.graph.call_function(operator.mod, (size, fit.modulus))
        fine = self.graph.call_function(operator.lt, (rest, fit.width))
        self.graph.call_function(torch._assert, (fine, f"axis {axis} of the input has to have {fit.describe()}"))

    def _scaled(self, value: fx.Node, factor: float) -> fx.Node:
        return value if factor == 1 else self.graph.call_function(operator.mul, (value, factor))

    def _known(self, node: fx.Node) -> Any:
        """Return a value, perhaps by another name: a dropout in a child returns the tensor that it is given."""
        if node in self.env:
            return self.env[node]
        if (same := self._alias.get(self.origin(node))) is not None:
            return self.env[same]
        if node in self.recording.sizes:
            return self.recording.sizes[node]
        name = self.recording.names[node]
        raise NotAffine("outer-reference", f"{self.call.path!r} uses a value that it is not given: {name}")


class _Written(_Builder):
    """A forward that is code, written down from what it was seen to do."""

    def build(self) -> fx.Graph:
        self._placeholders()
        if not _is_plain(self.call.output) or _has_sizes(self.call.output):
            raise NotAffine("structured-arguments", "forward returns an object of its own kind")
        self._write(self.call)
        self.graph.output(map_arg(self.call.output, self._known))
        return self.graph

    def _write(self, call: ModuleCall) -> None:
        self._check_writable(call)
        for item in call.own:
            if isinstance(item, ModuleCall):
                if item in self.dissolved:
                    self._write(item)
                else:
                    self._call(item)
            elif item in self.by_root:
                self._replace(item)
            elif item not in self.gone and item not in self.env and item.op not in ("placeholder", "output"):
                self._copy(item)

    def _replace(self, root: fx.Node) -> None:
        if root not in self.env:  # else a size of it was needed before
            value = self._sum(self.by_root[root])
            for node in (root, *self.by_root[root].after):
                self.know(node, value)

    def _check_writable(self, call: ModuleCall) -> None:
        """Raise NotAffine where the forward does what a graph does not show."""
        if (mark := self.recording.marks.get(call)) is not None:
            raise NotAffine(*mark)
        if call.enters_autocast:
            raise NotAffine("autocast", f"the forward of {call.path!r} enters a region of automatic mixed precision")
        if call.switches and not self._switches_for_constants(call.switches):
            raise NotAffine("writes-state", f"the forward of {call.path!r} switches gradients on or off")
        if not all(map(self.recording.constants.is_constant, call.stored)):
            raise NotAffine("writes-state", f"the forward of {call.path!r} stores what it computes")

    def _switches_for_constants(self, switches: tuple[int, ...]) -> bool:
        """Whether gradients are off, if at all, while weights are computed, which become plain ones."""
        between = self.recording.nodes[switches[0] : switches[-1]]
        made = (node for node in between if node in self.recording.shape_of and node.op != "get_attr")
        return len(switches) % 2 == 0 and all(map(self.recording.constants.is_constant, made))

    def _placeholders(self) -> None:
        parameters = inspect.signature(self.module.forward).parameters
        plain = [name for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        given = dict(zip(plain, self.call.args, strict=False)) | self.call.kwargs
        if len(self.call.args) > len(plain) or not set(given) <= set(plain):
            raise NotAffine("structured-arguments", "forward takes a variable number of arguments")
        held: list[tuple[fx.Node, Any]] = []
        for name in plain:
            default = parameters[name].default
            if default is not inspect.Parameter.empty and not _is_written(default):
                raise NotAffine("structured-arguments", f"the default of its argument {name!r} cannot be written down")
            held.append((self.graph.placeholder(name, default_value=default), given.get(name, default)))
        for node, value in held:
            leaves = list(_leaves(value))
            if any(isinstance(inner, fx.Node) for inner, _ in leaves):
                for inner, keys in leaves:
                    self._take(inner, self._part(node, keys))
            elif value is not inspect.Parameter.empty:
                self._assert(node, value)

    def _take(self, value: Any, node: fx.Node) -> None:
        """Let ``node`` be what the forward was given as ``value``."""
        if not isinstance(value, fx.Node):
            self._assert(node, value)
        elif value in self.env:
            raise NotAffine("called-differently", f"{self.call.path!r} is given one tensor twice")
        else:
            self.know(value, node)

    def _assert(self, node: fx.Node, value: Any) -> None:
        """Let the graph insist on the value that an argument had: with another one the forward may do other things."""
        if not _is_written(value):
            raise NotAffine("structured-arguments", f"its argument {str(node.target)!r} is no plain value")
        said = f"{node.target} was {value!r} when the network was converted: no other value will do"
        # Not ``is``: what reads a graph back from a file runs it on stand-ins, of which that would be false.
        holds = self.graph.call_function(operator.eq, (node, value))
        self.graph.call_function(torch._assert, (holds, said))

    def _known(self, node: fx.Node) -> Any:
        """Return a value; sizes and tensors of the network that only calls are given are read where they are needed."""
        vanished = node not in self.env and node in self.gone
        if vanished and self.recording.call_of[node] in {self.call, *self.dissolved}:
            measures = node in self.recording.run.size_of or node.target is getattr
            if measures or node.op == "get_attr":
                self._copy(node)
        return super()._known(node)

    def _copy(self, node: fx.Node) -> None:
        if node in self.recording.sizes:
            return
        self._check_line(node)
        if self._measures_elsewhere(node):
            return
        if node.target is assigned:
            self.know(node, lower(self.graph, map_arg(node.args, self._known)))
            return
        device = self._device() if self._is_made_anew(node) else {}
        copied, sizes = self.graph.node_copy(node, partial(self._operand, node)), node.all_input_nodes
        copied.kwargs = {**device, **copied.kwargs}
        if node.op == "get_attr":
            copied.target = self._relative(str(node.target))
        elif node.target in _FILLED and len(copied.args) > 1:
            copied.args = (copied.args,)
        elif node.target in (torch.tensor, torch.as_tensor) and self.recording.shape_of.keys().isdisjoint(sizes):
            self.graph.erase_node(copied)
            given = dict(zip(("data",), node.args, strict=False)) | node.kwargs
            copied = self._of_sizes(**map_arg(given, self._known))
        self.know(node, copied)

    def _is_made_anew(self, node: fx.Node) -> bool:
        """Whether a tensor is made of no other, and differs from call to call: it is drawn, or written into later.

        What reads a graph back from a file does at once, and once, what takes no value of the graph.
        """
        recording, made = self.recording, node.op == "call_function" and not node.all_input_nodes
        return made and (node in recording.run.random or bool(recording.memory.writers(node)))

    def _device(self) -> dict[str, fx.Node]:
        """Write the device of the first tensor that is given, on which what is made of none is made from now on."""
        given = (new for x, new in self.env.items() if x.op == "placeholder" and x in self.recording.shape_of)
        first = next(given, None)
        return {} if first is None else {"device": self.graph.call_function(getattr, (first, "device"))}

    def _check_line(self, node: fx.Node) -> None:
        """Raise NotAffine where an operation cannot be written down."""
        if node.target is unknown or node.target is set_data:
            raise NotAffine("writes-state", f"the forward of {self.call.path!r} does what a graph does not show")
        if (mark := self.recording.mark_of(node)) is not None:
            raise NotAffine(*mark)
        if not _is_plain((node.args, node.kwargs)):
            raise NotAffine(
                "structured-arguments", f"{self.recording.names[node]} is given what cannot be written down"
            )

    def _measures_elsewhere(self, node: fx.Node) -> bool:
        """Write a size of a value that is gone as that of one that stays, which has it at each size of the inputs; or
        its dtype or device. False where the node is none of these.
        """
        x, *rest = node.args or (None,)
        if not self._is_gone(x) or not (node in self.recording.run.size_of or node.target is getattr):
            return False
        root = self.root_of[x]
        self._replace(root)
        match node.target, rest:
            case _, ["dtype" | "device"]:
                self.know(node, self.graph.call_function(getattr, (self.env[root], *rest)))
            case "size", [int(axis)]:
                self.know(node, self.graph.call_method("size", self._of_the_size(x, axis)))
            case _:
                raise SizeGone(x, self.recording.names[x])
        return True

    def _of_the_size(self, x: fx.Node, axis: int) -> tuple[fx.Node, int]:
        wanted = self._sizes(x, axis)
        for other in reversed(self.env):
            for place in range(len(self.recording.shape_of.get(other, ()))):
                if self._sizes(other, place) == wanted:
                    return self.env[other], place
        raise SizeGone(x, self.recording.names[x])

    def _operand(self, node: fx.Node, x: fx.Node) -> Any:
        return self._alike(x) if self._is_gone(x) and only_measures(node, x) else self._known(x)

    def _is_gone(self, x: Any) -> TypeGuard[fx.Node]:
        there = not isinstance(x, fx.Node) or x in self.env or self.origin(x) in self._alias
        return not there and x in self.root_of

    def _alike(self, x: fx.Node) -> fx.Node:
        """Return a value that stays, of the shape at each size of the inputs that one has which is gone."""
        self._replace(self.root_of[x])
        shapes = self.recording.all_shapes
        for other in reversed(self.env):
            if self.recording.dtype_of.get(other) is self.recording.dtype_of[x] and shapes(other) == shapes(x):
                return self.env[other]  # type: ignore[no-any-return]
        raise SizeGone(x, self.recording.names[x])

    def _sizes(self, node: fx.Node, axis: int) -> list[int | None]:
        return [shape[axis] if -len(shape) <= axis < len(shape) else None for shape in self.recording.all_shapes(node)]

    def _of_sizes(self, data: Any, **options: Any) -> fx.Node:
        """Write ``torch.tensor(data)`` of sizes by operators that take the stand-ins of these, too, on which a graph
        runs that is read from a file.
        """
        if isinstance(data, list | tuple):
            return self.graph.call_function(torch.stack, ([self._of_sizes(each, **options) for each in data],))
        return self.graph.call_function(torch.full, ((), data), options)

    def _call(self, unit: ModuleCall) -> None:
        """Write the call of a child as it is; one that does nothing is left out."""
        looks = unit.own or unit.decisions or unit in self.recording.marks or unit.stored
        if not looks and not hooks_of(self.recording.modules[unit.path]):
            return
        if not _is_plain((unit.args, unit.kwargs)):
            raise NotAffine("structured-arguments", f"{unit.path!r} is given what cannot be written down")
        args, kwargs = map_arg(unit.args, self._known), map_arg(unit.kwargs, self._known)
        result = self.graph.call_module(self._relative(self._path_here(unit)), args, kwargs)
        for node, keys in _leaves(unit.output):
            if isinstance(node, fx.Node):
                self.know(node, self._part(result, keys))

    def _part(self, node: fx.Node, keys: Iterable[Any]) -> fx.Node:
        """Write how what lies at these keys, each within the last, is taken out of a value."""
        for key in keys:
            node = self.graph.call_function(operator.getitem, (node, key))
        return node

    def _path_here(self, unit: ModuleCall) -> str:
        """Return the path by which the forward reaches a module that may stand in several places: the one within its
        caller, whose forward is written here; at another place what is around it may get a new body.
        """
        caller = unit.caller.path if unit.caller else ""
        paths = self.recording.paths[unit.path]
        return next((x for each in (f"{caller}.", self.prefix) for x in paths if x.startswith(each)), unit.path)

    def _relative(self, path: str) -> str:
        if not path.startswith(self.prefix):
            raise NotAffine("outer-reference", f"the forward of {self.call.path!r} uses {path!r} from outside")
        return path.removeprefix(self.prefix)


class _Edited(_Builder):
    """A forward that is a graph already, with what is replaced in it: the rest, guards too, stays as it is."""

    def build(self) -> fx.Graph:  # noqa: C901
        assert isinstance(self.module, fx.GraphModule)
        lines, copied = self.call.lines, dict[fx.Node, fx.Node]()
        self.graph.set_codegen(copy.deepcopy(self.module.graph._codegen))
        after = {node: root for root, one in self.by_root.items() for node in one.after}
        done, skipped = dict[fx.Node, fx.Node](), dict[fx.Node, fx.Node]()

        def value(line: fx.Node) -> fx.Node:
            if line not in copied:
                copied[line] = self.graph.node_copy(line, value)
            return copied[line]

        for number, line in enumerate(self.module.graph.nodes):
            recorded = lines.get(number)
            root = after.get(recorded, recorded) if recorded is not None else None
            if root in self.by_root:
                if root not in done:
                    done[root] = self._sum(self.by_root[root])
                copied[line] = done[root]
            elif recorded in self.gone and line.op != "placeholder":
                skipped[line] = recorded
                continue
            elif line.op == "call_module" and type(self.module.get_submodule(str(line.target))).__name__ == "GuardsFn":
                self._write_guards(line, value)
            elif line.target is _METADATA and not skipped.keys().isdisjoint(line.all_input_nodes):
                continue  # what it asserts of a value that is no longer there
            else:
                value(line)
            if recorded is not None:
                self.know(recorded, copied[line])
        if self.by_root.keys() - done.keys():
            raise NotAffine("outer-reference", "what would merge is not computed by lines of the graph itself")
        self._check_gone({copied[line]: x for line, x in skipped.items() if line in copied and x in self.root_of})
        for line in reversed(self.graph.nodes):
            if line.op == "get_attr" and not line.users:
                self.graph.erase_node(line)
        return self.graph

    def _check_gone(self, gone: Mapping[fx.Node, fx.Node]) -> None:
        """Raise SizeGone where the output needs a line that computes what is gone: for its size alone."""
        seen, waiting = set[fx.Node](), [node for node in self.graph.nodes if node.op == "output"]
        while waiting:
            node = waiting.pop()
            if node in gone:
                raise SizeGone(gone[node], self.recording.names[gone[node]])
            if node not in seen:
                seen.add(node)
                waiting += node.all_input_nodes

    def _write_guards(self, line: fx.Node, value: Callable[[fx.Node], fx.Node]) -> None:
        """Write what an exported program checks of its inputs into the graph: its module for that cannot be saved.

        That stays nevertheless where no graph can say it: ``max`` of sizes.
        """
        tracer = GraphAppendingTracer(self.graph)
        given = tree_map_only(fx.Node, lambda x: fx.Proxy(value(x), tracer), tuple(line.args))
        before = len(self.graph.nodes)
        try:
            self.module.get_submodule(str(line.target)).forward(*given)
        except fx.proxy.TraceError:
            for written in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(written)
            value(line)


def vanishing(meanings: Meanings, call: ModuleCall, replacements: list[Replacement]) -> set[fx.Node]:
    """Return every node of the call that the replacements make superfluous, with the helpers that only they read."""
    inside = meanings.recording.nodes[call.start : call.stop]
    gone = set(meanings.dead.intersection(inside)).union(*(replacement.nodes for replacement in replacements))
    sources = {part.source for replacement in replacements for part in replacement.parts}
    seen: set[fx.Node] = set()
    while True:
        unread = _unread(inside, gone, meanings, sources | seen)
        more = {node for node in unread.intersection(meanings.written) if not _unseen(node, unread, meanings)}
        if not more:
            return unread
        seen |= more


def _unread(inside: list[fx.Node], gone: set[fx.Node], meanings: Meanings, stay: set[fx.Node]) -> set[fx.Node]:
    """Return what is gone with the helpers that nothing else reads, except for those that ``stay``."""
    found = set(gone)
    for node in reversed(inside):
        helps = node in meanings.helpers and node not in stay  # first: of most nodes neither
        if helps and (node.users or node in meanings.written) and found.issuperset(node.users):
            found.add(node)
    return found


def _unseen(writer: fx.Node, gone: set[fx.Node], meanings: Meanings) -> bool:
    """Whether nothing that stays reads the memory that the writer changes."""
    return all(gone.issuperset(member.users) for member in meanings.written[writer])


_FILLED = (torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn)
"""Functions that take sizes one by one, or in a tuple, and stand-ins for sizes in a tuple alone."""

_METADATA = torch.ops.aten._assert_tensor_metadata.default

_WRITTEN = (bool, int, float, complex, str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.memory_format)


def _is_written(value: Any) -> bool:
    """Whether code can be written that makes the value."""
    if type(value) in (tuple, list):
        return all(map(_is_written, value))
    return isinstance(value, _WRITTEN) or (isinstance(value, dict) and all(map(_is_written, value.values())))


def _is_plain(value: Any) -> bool:
    """Whether a graph can hold the value: tensors, and what can be written, in tuples, lists and plain dicts."""
    if isinstance(value, tuple) or type(value) in (list, immutable_list):
        return all(map(_is_plain, value))
    if type(value) in (dict, immutable_dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, slice):
        return _is_plain((value.start, value.stop, value.step))
    return isinstance(value, fx.Node | torch.layout) or _is_written(value)


def _has_sizes(value: Any) -> bool:
    """Whether a torch.Size is in a value: a graph would return a tuple, which has less."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return isinstance(value, Sizes) or any(map(_has_sizes, parts))


def _leaves(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield what is in a result, with the keys by which each is taken out of it."""
    if isinstance(value, tuple | list | dict):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(entry, (*keys, key))
    else:
        yield value, keys
