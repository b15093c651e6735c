"""graph -> regions: the nodes that are together a sum of affine maps of their sources.

Forward over the nodes, each affine node is a list of terms, one per branch. A node belongs to the region of its
consumers if they agree; a node that something else reads too, or that cannot be merged further, is the root of a
region of its own. Ending a region at a node (a *cut*) makes that node a source of others, so the passes repeat until
nothing is cut any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

from torch import fx

from repfuse.algebra.expression import Expression, Identity, Multiplied, Normalised, convolutions, sum_of
from repfuse.algebra.geometry import NotAffine
from repfuse.ops.meaning import Combined, Convolved, Meaning, Normed, Same, inputs_of, origin
from repfuse.tracing.trace import Traced

Nodes = frozenset[fx.Node]


@dataclass(frozen=True)
class Term:
    """One branch: ``expression`` of ``source``, made by ``nodes``; ``top`` is the last node that holds it alone."""

    source: fx.Node
    expression: Expression
    nodes: Nodes
    top: fx.Node

    @property
    def is_source(self) -> bool:
        """Whether the branch is the source itself."""
        return isinstance(self.expression, Identity)


@dataclass(frozen=True)
class Group:
    """Branches of one source that are together one map."""

    terms: tuple[Term, ...]

    @property
    def source(self) -> fx.Node:
        """The tensor that the branches read."""
        return self.terms[0].source

    @property
    def expression(self) -> Expression:
        """The map. Raises NotAffine where it is not one."""
        return sum_of(tuple(term.expression for term in self.terms))

    @property
    def nodes(self) -> Nodes:
        """The nodes that the map replaces."""
        return frozenset(chain.from_iterable(term.nodes for term in self.terms))

    @property
    def is_source(self) -> bool:
        """Whether the map is the source itself."""
        return len(self.terms) == 1 and self.terms[0].is_source

    @property
    def convolves(self) -> bool:
        """Whether there is a convolution to merge the rest into."""
        return next(convolutions(self.expression), None) is not None


@dataclass(frozen=True)
class Region:
    """``root`` is the sum of the groups. ``working`` are the nodes that compute, ``passing`` the no-ops among them."""

    root: fx.Node
    groups: tuple[Group, ...]
    working: Nodes
    passing: Nodes

    @property
    def nodes(self) -> Nodes:
        """Every node of the region."""
        return self.working | self.passing


Refuse = Callable[[NotAffine, fx.Node], None]
Accept = Callable[[Region, Group], bool]


class Regions:
    """Finds the regions of a graph.

    ``meanings`` says what each node is, ``ghosts`` are nodes that read no values. ``accept`` is the law of cost;
    ``refuse`` records what looked fusible and is not.
    """

    def __init__(
        self,
        traced: Traced,
        meanings: dict[fx.Node, Meaning | None],
        ghosts: set[fx.Node],
        accept: Accept,
        refuse: Refuse,
    ) -> None:
        self.traced = traced
        self.meanings = meanings
        self.ghosts = ghosts
        self.accept = accept
        self.refuse = refuse
        self._roots: dict[fx.Node, fx.Node] = {}
        self._terms: dict[fx.Node, tuple[Term, ...]] = {}
        self._cuts: set[fx.Node] = set()

    def find(self) -> list[Region]:
        """Return the regions, in the order of the graph. Every pass cuts a node or is the last, so this ends."""
        while True:
            known = len(self._cuts)
            self._partition()
            self._terms = {}
            for node in self.traced.nodes:
                if node in self._roots:
                    self._terms[node] = tuple(self._terms_of(node))
            regions = [self._judge(node) for node in self._terms if self._roots[node] is node]
            if len(self._cuts) == known:
                return regions

    def escaping(self) -> Iterator[fx.Node]:
        """Yield the values that would have merged into one of their readers if nothing else had read them."""
        for meaning in self.meanings.values():
            sources = {origin(x, self.meanings) for x in inputs_of(meaning)}
            if not isinstance(meaning, Normed | Combined):
                continue
            for value in sources:
                readers = [user for user in value.users if user not in self.ghosts]
                roots = {term.source for other in sources - {value} for term in self._terms.get(other, ())} | sources
                branch = self._terms.get(value, ())
                alone = isinstance(meaning, Normed) or any(term.source in roots for term in branch)
                if len(readers) > 1 and alone and any(True for term in branch for _ in convolutions(term.expression)):
                    yield value

    def _cut(self, node: fx.Node) -> None:
        computing = origin(node, self.meanings)
        if inputs_of(self.meanings.get(computing)):
            self._cuts.add(computing)

    def _partition(self) -> None:
        """Give every affine node the root of its region: that of its consumers if they agree, else itself."""
        self._roots = {}
        for node in reversed(self.traced.nodes):
            if not inputs_of(self.meanings.get(node)):
                continue
            roots = {self._root_of_reader(node, user) for user in node.users if user not in self.ghosts}
            root = roots.pop() if len(roots) == 1 else None
            self._roots[node] = node if root is None or node in self._cuts else root

    def _root_of_reader(self, node: fx.Node, user: fx.Node) -> fx.Node | None:
        return self._roots[user] if node in inputs_of(self.meanings.get(user)) else None

    def _terms_of(self, node: fx.Node) -> Iterator[Term]:
        match self.meanings[node]:
            case Convolved(x, convolution):
                source, copies = self._whole_input(x, node)
                yield Term(source, convolution, copies | {node}, node)
            case Normed(x, normalisation):
                term = self._one_term(x, node)
                yield _grown(term, node, Normalised(term.expression, normalisation), node)
            case Same(x):
                terms = self._reach(x, node)
                for term in terms:
                    yield _grown(term, node, term.expression, node if len(terms) == 1 else term.top)
            case Combined(operands):
                alone = len(operands) == 1 and len(self._reach(operands[0][0], node)) == 1
                for x, factor in operands:
                    for term in self._reach(x, node):
                        expression = term.expression if factor == 1 else Multiplied(term.expression, factor)
                        yield _grown(term, node, expression, node if alone else term.top)

    def _reach(self, x: fx.Node, node: fx.Node) -> tuple[Term, ...]:
        """Return the terms of an operand of ``node``: looked through within the region, the value itself outside."""
        if x in self._terms and self._roots[x] is self._roots[node]:
            return self._terms[x]
        return (self._source(x),)

    def _source(self, x: fx.Node) -> Term:
        """Return the value of ``x`` itself as a term: channels are axis 1, what follows are spatial axes."""
        source = origin(x, self.meanings)
        shape = self.traced.shape_of[source]
        identity = Identity(shape[1] if len(shape) > 1 else 1, max(len(shape) - 2, 0))
        return Term(source, identity, frozenset(), source)

    def _whole_input(self, x: fx.Node, node: fx.Node) -> tuple[fx.Node, Nodes]:
        """Return the source of a convolution and the no-ops before it; of anything else, the region ends there."""
        terms = self._reach(x, node)
        if len(terms) == 1 and terms[0].is_source:
            return terms[0].source, terms[0].nodes
        self._cut(x)
        self.refuse(_why_not_composed(terms, self.meanings[node]), node)
        return origin(x, self.meanings), frozenset()

    def _one_term(self, x: fx.Node, node: fx.Node) -> Term:
        """Return the operand of a normalisation as one term; a sum that is not one map ends the region before it."""
        terms = self._reach(x, node)
        try:
            return _normalised(terms, len(self.traced.shape_of[node]), node)
        except NotAffine as error:
            self._cut(x)
            self.refuse(error, node)
            return self._source(x)

    def _judge(self, root: fx.Node) -> Region:
        """Group the terms of a region, and cut it where a group is better left to itself."""
        terms = self._terms[root]
        groups = self._grouped(terms, root)
        region = self._region(root, tuple(Group(tuple(terms[i] for i in group)) for group in groups))
        apart = len(groups) > 1 and not self._separated(root, region, groups)
        if apart or not all(group.is_source or self.accept(region, group) for group in region.groups):
            self._take_apart(root)
        return region

    def _region(self, root: fx.Node, groups: tuple[Group, ...]) -> Region:
        """Return the region without the no-ops at its end: they stay, after the one convolution."""
        nodes = frozenset(chain.from_iterable(group.nodes for group in groups))
        while isinstance(meaning := self.meanings[root], Same) and meaning.input in nodes:
            nodes -= {root}
            root = meaning.input
        passing = frozenset(node for node in nodes if isinstance(self.meanings[node], Same))
        return Region(root, groups, nodes - passing, passing)

    def _grouped(self, terms: tuple[Term, ...], root: fx.Node) -> list[list[int]]:
        """Partition the terms, by index, into groups that are one map each."""
        groups: list[list[int]] = []
        for index, term in enumerate(terms):
            for group in groups:
                if terms[group[0]].source is not term.source:
                    continue
                try:
                    sum_of((*(terms[i].expression for i in group), term.expression))
                except NotAffine as error:
                    self.refuse(error, root)
                else:
                    group.append(index)
                    break
            else:
                groups.append([index])
        return groups

    def _separated(self, root: fx.Node, region: Region, groups: list[list[int]]) -> bool:
        """Cut off the branches that merge with no other; whether what is left needs this root to merge."""
        for group in region.groups:
            if len(group.terms) == 1 and not group.is_source:
                self._cut(group.terms[0].top)
        operand_of = [
            index for index, operand in enumerate(inputs_of(self.meanings[root])) for _ in self._reach(operand, root)
        ]
        return any(len({operand_of[i] for i in group}) > 1 for group in groups)

    def _take_apart(self, root: fx.Node) -> None:
        for operand in inputs_of(self.meanings[root]):
            self._cut(operand)


def _normalised(terms: tuple[Term, ...], axes: int, node: fx.Node) -> Term:
    """Return the operand of a normalisation of ``axes`` axes. Raises NotAffine where it is not one map."""
    if any(term.expression.geometry.ndim + 2 != axes for term in terms):
        raise NotAffine("channel-mismatch", "without a batch axis, the normalisation is along another axis")
    if len({term.source for term in terms}) > 1:
        raise NotAffine("several-sources", "a normalisation of a sum over several sources")
    group = Group(terms)
    return terms[0] if len(terms) == 1 else Term(group.source, group.expression, group.nodes, node)


def _grown(term: Term, node: fx.Node, expression: Expression, top: fx.Node) -> Term:
    return replace(term, expression=expression, nodes=term.nodes | {node}, top=top)


def _why_not_composed(terms: tuple[Term, ...], meaning: Meaning | None) -> NotAffine:
    assert isinstance(meaning, Convolved)
    shifted = any(isinstance(term.expression, Normalised) for term in terms)
    if shifted and meaning.convolution.geometry.pads:
        return NotAffine("shift-before-padding", "a normalisation before a convolution that pads its input with zeros")
    return NotAffine("composition", "a convolution of the result of another affine layer")
