"""regions -> edits: in which module each fused convolution lives, and in which of four forms it is written there.

1. *fold*: one convolution with normalisations: new weights in that convolution, ``Identity`` for the rest.
2. *swap*: several layers in a row: the fused convolution in the place of one, ``Identity`` for the rest.
3. *chain*: a block that becomes modules in a row: ``Sequential`` of stock modules, or the one convolution; and a
   convolution with its norm, where their class has a ``fuse`` that makes the one convolution of them.
4. *graph*: otherwise a ``GraphModule`` of that block alone.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, cached_property
from keyword import iskeyword
from types import CodeType, FunctionType
from typing import Any

from torch import fx, nn
from torch.utils._pytree import tree_leaves

from repfuse.algebra.expression import Expression, Scaled
from repfuse.algebra.geometry import NotAffine
from repfuse.networks import join, named_tensors
from repfuse.ops.meaning import Same
from repfuse.ops.table import Meanings
from repfuse.planning.cost import needs_separate_pad
from repfuse.planning.edits import Block, Fused, Layout, is_affine_norm, place_of
from repfuse.planning.folding import Folding, ModuleRow, call_signature
from repfuse.planning.local import Replacement, SizeGone, Summand, local_graph, vanishing
from repfuse.planning.region import Group, Region, pieces
from repfuse.plans import above
from repfuse.recording.run import ModuleCall
from repfuse.recording.stock import hooks_of, is_stock

# The new body of a block: what it is made of, and how its parts are called.


_RESERVED = frozenset(dir(fx.GraphModule)) - frozenset(dir(nn.Module))


def check_names(graph: fx.Graph) -> None:
    """Raise NotAffine where a child is called like a member of every GraphModule, ``graph``, or like a word of Python's
    own, ``in``: no code can be written that reads it.
    """
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            first, *_ = names = str(node.target).split(".")
            name = next(filter(iskeyword, names), first)
            if name in _RESERVED or iskeyword(name):
                raise NotAffine("reserved-name", f"a child is called {name!r}")


_SLOT = re.compile(r"reparam|fused|deploy|merged")
"""How authors call the attribute that holds the convolution of a converted block."""


def fused_names(module: nn.Module, count: int) -> tuple[str, ...]:
    """Name the new convolutions of a block: as its own forward calls the converted one, where it knows of one."""
    code = getattr(type(module).forward, "__code__", None)
    slots = [name for name in (code.co_names if code else ()) if _SLOT.search(name)]
    free = [name for name in slots if getattr(module, name, None) is None]
    if count == 1 and free:
        return (free[0],)
    names = (f"fused_{index}" if index else "fused" for index in itertools.count())
    return tuple(itertools.islice((name for name in names if not hasattr(module, name)), count))


def is_replaced_by(owner: type[nn.Module], layer: type[nn.Module]) -> bool:
    """Whether ``fuse`` of the owner makes a ``layer`` and sets nothing: its authors put that in its place (LeViT and
    its heirs).
    """
    function = _function(getattr(owner, "fuse", None))
    if function is None or layer.__name__ not in function.__code__.co_names:
        return False
    return all(step.opname not in ("STORE_ATTR", "DELETE_ATTR") for step in dis.get_instructions(function))


def is_named(kind: Any, name: str | None, others: set[str]) -> bool:
    """Whether a method of the class names ``name`` and with it one of ``others``, as ``self.head.l`` does; or, where
    the way there is numbers alone, one of ``others``, as ``self[0].l`` does.
    """
    return any(name in (None, *names) and not others.isdisjoint(names) for names in _names_in(kind))


@cache
def _names_in(kind: type[nn.Module]) -> tuple[set[str], ...]:
    """Return the names that each method of a class looks up, with the functions within it."""
    classes = itertools.takewhile(lambda base: base is not nn.Module, kind.__mro__)
    functions = map(_function, itertools.chain.from_iterable(vars(base).values() for base in classes))
    found = []
    for function in filter(None, functions):
        codes = [function.__code__]
        for code in codes:
            codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
        found.append({name for code in codes for name in code.co_names})
    return tuple(found)


def _function(method: Any) -> FunctionType | None:
    """Return the function that a method, or a property, also one that is kept, is."""
    inner: Any = method.fget if isinstance(method, property) else method
    function = inspect.unwrap(inner.func if isinstance(inner, cached_property) else inner)
    return function if isinstance(function, FunctionType) else None


class LayingOut:
    """Decides owner and form of every candidate; what has no place is a refusal.

    The outermost module gets a new body, and loses its class, only for what is ``worth_the_class``. ``keeps_norm`` says
    behind which convolutions a BatchNorm stays.
    """

    def __init__(
        self,
        meanings: Meanings,
        worth_the_class: Callable[[list[Region]], bool],
        keeps_norm: Callable[[Region, Group], bool],
    ) -> None:
        self.recording = meanings.recording
        self.meanings = meanings
        self.refuse = meanings.refuse
        self.worth_the_class = worth_the_class
        self.keeps_norm = keeps_norm
        self.layout = Layout()
        self.folding = Folding(meanings)
        self.uses = self.folding.uses
        self.touched: Counter[ModuleCall] = Counter()
        """How many candidates have nodes in a call."""

    def run(self, candidates: list[Region]) -> Layout:
        """Lay out the candidates."""
        blocks: dict[ModuleCall, list[Region]] = defaultdict(list)
        kept = self._once_per_module(candidates)
        self.touched = Counter(call for _, region in kept for call in self._calls(region))
        alike: dict[tuple[ModuleCall, tuple[Expression, ...]], list[Region]] = defaultdict(list)
        for call, region in kept:
            alike[call, region.maps].append(region)
        for call, region in kept:
            inside = self.recording.call_of[region.root]
            if call.lines and inside is not call and region.root not in call.lines.values():
                error = NotAffine("outer-reference", f"it is within {inside.path!r}, one line of a graph")
                self._leave(inside, [region], error)
                continue
            try:
                if not self._fold(call, region, alike[call, region.maps]):  # itself among them
                    blocks[call].append(region)
            except NotAffine as error:
                self._refuse([region], error)
        for call, members in self._raised(self._whole(blocks)).items():
            try:
                self.layout.blocks.append(self._block(call, members))
            except NotAffine as error:
                self._leave(call, members, error)
        return self.layout

    def _leave(self, call: ModuleCall, regions: Iterable[Region], error: NotAffine) -> None:
        """Refuse what would be written into a call, which cannot be."""
        if not isinstance(error, SizeGone):
            self.layout.refused[call] = error.code, error.reason
        self._refuse(regions, error)

    def _refuse(self, regions: Iterable[Region], error: NotAffine) -> None:
        """Refuse regions; where the size of a value within them is missing, smaller ones are looked for instead."""
        if isinstance(error, SizeGone):
            self.layout.sized.add(error.node)
        else:
            for region in regions:
                self.refuse(error, region.root)

    # Which call of which module gets which regions: a module is rewritten once, for all its calls, or not at all.

    def _once_per_module(self, candidates: list[Region]) -> list[tuple[ModuleCall, Region]]:
        """Keep one of the calls of each owner; those whose calls differ are ``unlike``."""
        found: dict[str, dict[ModuleCall, dict[tuple[int, ...], Region]]] = defaultdict(lambda: defaultdict(dict))
        for region in candidates:
            call, place = place_of(self.recording, region)
            found[call.path][call][place] = region
        kept = []
        for path, by_call in found.items():
            calls = self.recording.calls[path]
            if all(by_call[call].keys() == by_call[calls[0]].keys() for call in calls):
                kept += [(calls[0], region) for region in by_call[calls[0]].values()]
                continue
            self.layout.unlike.add(path)
            error = NotAffine("called-differently", f"{path!r} is called {len(calls)} times, not always alike")
            for region in (region for places in by_call.values() for region in places.values()):
                self.refuse(error, region.root)
        return kept

    def _whole(self, blocks: Mapping[ModuleCall, list[Region]]) -> dict[ModuleCall, list[Region]]:
        """Refuse what would take apart one call of a module that gets a new body for all its calls."""
        rewritten = {call.path for call in blocks}
        kept: dict[ModuleCall, list[Region]] = defaultdict(list)
        for call, members in blocks.items():
            for region in members:
                inner = self._within(call, self._nodes_in(call, region))
                torn = [each.path for each in inner if each.path in rewritten and each not in blocks]
                if torn:
                    error = NotAffine("called-differently", f"another call of {torn[0]!r} is merged on its own")
                    self.refuse(error, region.root)
                else:
                    kept[call].append(region)
        return kept

    def _raised(self, blocks: Mapping[ModuleCall, list[Region]]) -> dict[ModuleCall, list[Region]]:
        """Move what lies in a module that an outer block dissolves up to that block."""
        moved: dict[ModuleCall, list[Region]] = defaultdict(list)
        for call in sorted(blocks, key=lambda call: (call.start, len(list(call.chain())))):  # the outermost first
            outers = (outer for outer in reversed(list(call.chain())) if self._dissolves(moved.get(outer, ()), call))
            moved[next(outers, call)] += blocks[call]
        return moved

    def _dissolves(self, regions: Iterable[Region], call: ModuleCall) -> bool:
        return any(call in self.recording.call_of[node].chain() for region in regions for node in region.nodes)

    def _nodes_in(self, call: ModuleCall, region: Region) -> list[fx.Node]:
        """Return the nodes of the region that the call made; a no-op before it may stand outside."""
        return [node for node in region.nodes if call.start <= self.recording.order[node] < call.stop]

    def _within(self, call: ModuleCall, nodes: Iterable[fx.Node]) -> set[ModuleCall]:
        """Return the calls within ``call`` in which the nodes were made."""
        return {inner for node in nodes for inner in self.recording.call_of[node].up_to(call)}

    def _calls(self, region: Region) -> set[ModuleCall]:
        """Return every call in which a node of the region was made."""
        return {call for node in region.nodes for call in self.recording.call_of[node].chain()}

    def _fold(self, call: ModuleCall, region: Region, alike: list[Region]) -> bool:
        """Lay a region out as a fold or a swap, if it is modules in a row that nothing else uses.

        Where modules run in a loop, that has to do for all of the regions ``alike``.
        """
        if region.joined_along is not None:
            return len(alike) == 1 and self._fold_joined(call, region)
        row, *others = (self.folding.row(each, call, alike) for each in alike)
        if row is None or any(other != row for other in others):
            return False
        self._check_hooks(*self._within(call, region.nodes))
        within: dict[ModuleCall, list[fx.Node]] = defaultdict(list)
        for node in row.norms:
            within[self.recording.call_of[node]].append(node)
        bodies = [self._without(inner, nodes, call) for inner, nodes in within.items()]
        if None in bodies:
            return False
        if (layer := self._layer(call, region, row)) is not None:
            self.layout.blocks.append(layer)
            return True
        path, (group,) = row.convolution, region.written
        norm = self._norm_of(row, region) if self.keeps_norm(region, group) else ""
        fused = Fused(path, call.path, "fold" if row.stays else "swap", region, group, norm)
        if row.stays:
            self.layout.folds.append(fused)
        else:
            self.layout.blocks.append(Block(path, fx.Graph(), ("fused",), {"fused": fused}))
        self.layout.identities += [path for path in row.others if path not in (norm, *self.layout.identities)]
        self.layout.blocks += [body for body in bodies if body is not None]
        return True

    def _fold_joined(self, call: ModuleCall, region: Region) -> bool:
        """The same of a region that joins modules: each of them takes what is done to its own channels."""
        rows = self.folding.rows(region, call)
        if rows is None or any(self.keeps_norm(region, group) for group in region.written):
            return False
        self._check_hooks(*self._within(call, region.nodes))
        for row, group in zip(rows, region.written, strict=True):
            self.layout.folds.append(Fused(row.convolution, call.path, "fold", region, group))
            self.layout.identities += [path for path in row.others if path not in self.layout.identities]
        return True

    def _layer(self, call: ModuleCall, region: Region, row: ModuleRow) -> Block | None:
        """Return the row's layer as the new body of the module that calls it, if its ``fuse`` would put it there, too.

        None where a method of a module around it would miss what is in it, or its ``fuse``.
        """
        module, layer = (self.recording.modules[path] for path in (call.path, row.convolution))
        if not is_replaced_by(type(module), type(layer)):
            return None
        for path in self.recording.paths[call.path]:
            for outer in ("", *above(path)):
                inside = path.removeprefix(outer).split(".")
                name = next((part for part in reversed(inside) if part and not part.isdecimal()), None)
                kind = type(self.recording.modules[outer])
                if not path or is_named(kind, name, {"fuse", *module._modules}):
                    return None
        try:
            block = self._block(call, [region])
        except NotAffine:  # it has hooks, or a part of it is used from outside
            return None
        (fused,) = block.fused.values()
        neighbours = fused.norm or fused.expression.has_ones or needs_separate_pad(fused.expression.geometry)
        return block if fused.path == call.path and not neighbours else None

    def _norm_of(self, row: ModuleRow, region: Region) -> str:
        """Return where the norm of a row stays: the last of its modules, where that is one, else in the new module."""
        last = self.recording.call_of[region.root].path
        module = self.recording.modules[last]
        if last in row.others and is_affine_norm(module):
            return last
        return "" if row.stays else join(row.convolution, "norm")

    def _without(self, call: ModuleCall, norms: list[fx.Node], owner: ModuleCall) -> Block | None:
        """Return the body of the module whose forward makes ``norms``, without them.

        None where it is the owner's own, or where another candidate has a part of it: a module gets one new body.
        """
        if call is owner or len(self.recording.calls[call.path]) != len(self.recording.calls[owner.path]):
            return None
        if self.touched[call] > 1:
            return None
        replacements = []
        for norm in norms:
            meaning = self.meanings[norm]
            assert isinstance(meaning, Scaled)
            replacements.append(Replacement(norm, (Summand(meaning.input, None),), frozenset({norm})))
        self._check_hooks(call)
        graph = local_graph(self.meanings, call, replacements)
        self._check_uses(call, graph)
        return Block(call.path, graph, self._steps(call, graph))

    def _block(self, call: ModuleCall, candidates: list[Region]) -> Block:
        """Lay out every candidate of one owner as the owner's new body."""
        fused = [(candidate, group) for candidate in candidates for group in candidate.written]
        names = self._names(call, [candidate for candidate, _ in fused])
        name_of = {id(group): name for (_, group), name in zip(fused, names, strict=True)}
        replacements = [each for member in candidates for each in self._replacements(call, member, name_of)]
        replaced = {node for each in replacements for node in each.nodes}
        self._check_hooks(call, *self._within(call, replaced))
        self._check_readers(call, replaced)
        graph = local_graph(self.meanings, call, replacements)
        kept, steps = self._unread(call, replacements, graph), self._steps(call, graph)
        self._check_uses(call, graph, kept)
        form = "graph" if steps is None or kept else "chain"
        owner = type(self.recording.modules[call.path])
        stays = issubclass(owner, fx.GraphModule) or (form == "chain" and owner is nn.Sequential)
        if not call.path and not stays and not self.worth_the_class(candidates):
            reason = f"for this the model would no longer be a {owner.__name__}, and lose its methods"
            raise NotAffine("outermost-class", reason)
        if form == "graph":
            check_names(graph)
        # A block that is one convolution and nothing else is that convolution, unless its class names a place for it.
        alone = form == "chain" and steps == ("fused",)
        written = {}
        for name, (candidate, group) in zip(names, fused, strict=True):
            path = call.path if alone else join(call.path, name)
            norm = join(path, "norm") if self.keeps_norm(candidate, group) else ""
            written[name] = Fused(path, call.path, form, candidate, group, norm)
        return Block(call.path, graph, steps if form == "chain" else None, written, kept)

    def _names(self, call: ModuleCall, candidates: list[Region]) -> tuple[str, ...]:
        """Name the convolutions of the owner's new body, one for each candidate.

        In a graph that calls a module for each operation, after the one whose result they give.
        """
        module = self.recording.modules[call.path]
        made = [self.recording.call_of[candidate.root] for candidate in candidates]
        if not isinstance(module, fx.GraphModule) or any(each.caller is not call for each in made):
            return fused_names(module, len(candidates))
        own = (f"{each.path.rpartition('.')[2]}_fused" for each in made)
        taken: Counter[str] = Counter()
        names = []
        for name in own:
            names.append(f"{name}_{taken[name]}" if taken[name] else name)
            taken[name] += 1
        return tuple(names)

    def _replacements(self, call: ModuleCall, region: Region, name_of: dict[int, str]) -> Iterator[Replacement]:
        """Yield what stands for the region; one piece after the other where values are put elsewhere in between."""
        inside = self._nodes_in(call, region)
        after = self._after(call, region.root, inside)
        found = pieces(region, self.meanings)
        for piece in found:
            name = name_of[id(region.groups[0])] if piece.layered else None
            last = after if piece is found[-1] else []
            nodes = frozenset((*piece.nodes.intersection(inside), *last))
            fits = region.groups[0].expression.geometry.fits if piece.layered else ()
            yield Replacement(piece.root, (Summand(piece.source, name, 1.0, fits),), nodes, tuple(last))
        if not found:
            parts = tuple(
                Summand(g.source, name_of.get(id(g)), g.of_source or 1.0, g.expression.geometry.fits)
                for g in region.groups
            )
            yield Replacement(region.root, parts, frozenset((*inside, *after)), tuple(after), region.joined_along)

    def _after(self, call: ModuleCall, root: fx.Node, nodes: list[fx.Node]) -> list[fx.Node]:
        """Return the no-ops after ``root`` that are operations (``x + 0``), with the modules among them.

        Modules that are no-ops stay at the end of the block, and operations in blocks that are not dissolved with
        ``nodes`` stay there.
        """
        dissolved = {call, *self._within(call, nodes)}
        after, passed = list[fx.Node](), list[fx.Node]()
        while len(readers := [user for user in root.users if not self.meanings.reads_nothing(user, root)]) == 1:
            (root,) = readers
            passed.append(root)
            if not isinstance(self.meanings.get(root), Same) or self.recording.call_of[root] not in dissolved:
                break
            after = list(passed)
        return after

    def _unread(self, call: ModuleCall, replacements: list[Replacement], graph: fx.Graph) -> tuple[str, ...]:
        """Return the tensors in the owner that neither the old nor the new body uses."""
        owner = self.recording.modules[call.path]
        used = tuple(f"{node.target}." for node in graph.nodes if node.op in ("call_module", "get_attr"))
        vanished = vanishing(self.meanings, call, replacements)
        read = {name for node in vanished if node.op == "get_attr" for name in self.uses.names_of(str(node.target))}
        made = {self.recording.call_of[node].path for node in vanished}
        holders = {path for path in made if is_stock(self.recording.modules[path])}
        holders = (holders | {name.rpartition(".")[0] for name in read}) - {call.path}
        there = ((join(call.path, name), name) for name, _ in named_tensors(owner, remove_duplicate=False))
        return tuple(
            name
            for full, name in there
            if full not in read and full.rpartition(".")[0] not in holders and not f"{name}.".startswith(used)
        )

    def _steps(self, call: ModuleCall, graph: fx.Graph) -> tuple[str, ...] | None:
        """Return the modules that the graph is in a row, if it is: distinct direct children, each fed by the last.

        A row of modules takes no arguments by name.
        """
        value, *rest = graph.nodes
        if value.op != "placeholder" or any(other.kwargs for other in self.recording.calls[call.path]):
            return None
        names: list[str] = []
        for node in rest[:-1]:
            if node.op != "call_module" or node.args != (value,) or node.kwargs or "." in str(node.target):
                return None
            names.append(str(node.target))
            value = node
        return tuple(names) if rest[-1].args == (value,) and len(set(names)) == len(names) else None

    def _check_readers(self, call: ModuleCall, nodes: set[fx.Node]) -> None:
        """Raise NotAffine where something outside reads one of the nodes that the call does not return.

        It has the tensor under another name, and sees what was written into it.
        """
        order, returned = self.recording.order, {x for x in tree_leaves(call.output) if isinstance(x, fx.Node)}
        if any(order.get(user, 0) >= call.stop for node in nodes - returned for user in node.users):
            raise NotAffine("in-place", f"what {call.path!r} writes into a tensor is read outside of it")

    def _check_uses(self, call: ModuleCall, graph: fx.Graph, kept: tuple[str, ...] = ()) -> None:
        """Raise NotAffine where one new body, ``graph``, does not serve every call, or hides what others reach for."""
        calls = self.recording.calls[call.path]
        if len(calls) > 1 and len({call_signature(self.meanings, other) for other in calls}) > 1:
            raise NotAffine("called-differently", f"{call.path!r} is called with other arguments each time")
        there = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
        for target in self.uses.reached[call.path]:
            name = target[len(call.path) + 1 :]
            if name not in kept and not any(f"{name}.".startswith(f"{path}.") for path in there):
                raise NotAffine("outer-reference", f"{target!r} is used from outside of {call.path!r}")

    def _check_hooks(self, *calls: ModuleCall) -> None:
        """Raise NotAffine where one of the modules has hooks: they would be lost, or see another value."""
        for path in {call.path for call in calls}:
            if hooks_of(self.recording.modules[path]):
                raise NotAffine("hooks", f"{path or 'the model'} carries hooks, which the rewrite would lose")
