"""One region: nodes that are together a sum of affine maps of their sources, or these joined, and what it costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain, combinations
from typing import NamedTuple

from torch import fx

from repfuse.algebra.expression import (
    Expression,
    Joined,
    Scaled,
    Selected,
    Sum,
    Through,
    channels_read,
    multiple_of_source,
    of_channels_read,
    sum_of,
)
from repfuse.algebra.geometry import Ints, NotAffine
from repfuse.algebra.layers import Convolution
from repfuse.ops.meaning import Rearranged, Same, inputs_of
from repfuse.ops.spelling import operator_of
from repfuse.ops.sums import ARITHMETIC
from repfuse.ops.table import Meanings
from repfuse.planning.cost import convolution_cost, elementwise_cost, filter_cost, homogeneous_cost, is_better, price
from repfuse.plans import Cost, Key, Policy, total

# What a node computes, as a sum of terms: each one branch, an affine map of one source.


Nodes = frozenset[fx.Node]


class Term(NamedTuple):
    """One branch: ``expression`` of ``source``, made by ``nodes``; ``top`` is the last node that holds it alone.

    Where it was rearranged on the way (``ops.channels``), ``axis`` is where its channels are now: it is a map of
    channels alone, and of rows that are others than those of its source. Where several channels became one, ``picks``
    says which one each of them is in, and ``phases`` which of its pixels it is, if it can be another number of them.
    Where views alone took it there, ``left`` is the value before them; those that another one took back are ``undone``.
    Where maps of several sources were joined, ``span`` are the channels that are its own, from the first to before the
    last.
    """

    source: fx.Node
    expression: Expression
    nodes: Nodes
    top: fx.Node
    axis: int | None = None
    picks: Ints = ()
    phases: Ints = ()
    left: fx.Node | None = None
    undone: Nodes = frozenset()
    span: tuple[int, int] | None = None

    @property
    def of_source(self) -> float | None:
        """The number that the branch multiplies its source by, if it does nothing else."""
        return multiple_of_source(self.expression)

    @property
    def convolves(self) -> bool:
        """Whether there is a convolution in the branch."""
        return self.expression.convolves


@dataclass(frozen=True, eq=False)
class Group:
    """Branches of one source that are together one map. Raises NotAffine where they are not.

    Where they all read what one node has ``chosen`` of its channels, they may be a map of that node.
    """

    terms: tuple[Term, ...]
    chosen: fx.Node | None = None

    @property
    def source(self) -> fx.Node:
        """The tensor that the branches read."""
        return self.chosen or self.terms[0].source

    @cached_property
    def expression(self) -> Expression:
        """The map."""
        whole = sum_of(tuple(term.expression for term in self.terms))
        return of_channels_read(whole) if self.chosen else whole

    @cached_property
    def nodes(self) -> Nodes:
        """The nodes that the map replaces: without what was chosen, and what that is made of."""
        nodes = frozenset(chain.from_iterable(term.nodes for term in self.terms))
        seen, before = {term.source for term in self.terms}, [self.chosen] if self.chosen else []
        while before:
            node = before.pop()
            if node not in seen:
                seen.add(node)
                before += node.all_input_nodes
        return nodes - seen if self.chosen else nodes

    @property
    def span(self) -> tuple[int, int] | None:
        """The channels that are its own, where groups are joined."""
        return self.terms[0].span

    @property
    def of_source(self) -> float | None:
        """The number that the group multiplies its source by, if it does nothing else."""
        return self.terms[0].of_source if len(self.terms) == 1 else None

    @property
    def convolves(self) -> bool:
        """Whether there is a convolution to merge the rest into."""
        return any(term.convolves for term in self.terms)


# The cost of what is there, and of what would replace it, at the shapes of the example.


class Estimate:
    """Estimates for one recorded network."""

    def __init__(self, meanings: Meanings, policy: Policy) -> None:
        self.meanings = meanings
        self.recording = meanings.recording
        self.policy = policy
        self.of_node = cache(self._cost)

    def price(self, cost: Cost) -> float:
        """Return what the policy compares."""
        return price(cost, self.policy)

    def is_better(self, after: Cost, before: Cost) -> bool:
        """Whether the policy prefers ``after`` by enough to replace ``before`` by it."""
        return is_better(after, before, self.policy)

    def of_nodes(self, nodes: Iterable[fx.Node]) -> Cost:
        """Cost of the nodes as they are, computed weights included."""
        return total(map(self.of_node, nodes))

    def of_map(self, expression: Expression, source: fx.Node, output: Sequence[int]) -> Cost:
        """Cost of an expression as one convolution from the value of ``source`` to a map of shape ``output``."""
        geometry = expression.geometry.plainest
        shape = (*output[:1], geometry.out_channels, *output[2:]) if geometry.ndim else output
        law = homogeneous_cost if expression.has_ones else convolution_cost
        return law(geometry, tuple(shape), self.recording.shape_of[source], self._item(source))

    def of_groups(self, groups: Sequence[Group], root: fx.Node) -> Cost:
        """Cost of the sum of ``groups``, one convolution each, or of joining them."""
        parts = [self.of_map(g.expression, g.source, self.shape_made(g, root)) for g in groups if g.of_source is None]
        return total([*parts, self.of_joining(groups, root)])

    def of_joining(self, groups: Sequence[Group], root: fx.Node) -> Cost:
        """Cost of what stays between the convolutions that ``groups`` become and ``root``."""
        shape, item = self.recording.shape_of[root], self._item(root)
        if groups[0].span:
            return elementwise_cost(shape, 1, item)
        factors = [elementwise_cost(shape, 1, item) for g in groups if g.of_source not in (None, 1, -1)]
        sums = [elementwise_cost(shape, 2, item)] * (len(groups) - 1)
        return total([*factors, *sums])

    def of_norm(self, group: Group, root: fx.Node) -> Cost:
        """Cost of a BatchNorm behind the convolution that a group becomes."""
        shape = self.shape_made(group, root)
        return elementwise_cost(shape, 1, self._item(root), parameters=4 * shape[1])

    def shape_made(self, group: Group, root: fx.Node) -> tuple[int, ...]:
        """Return the shape of what the convolution makes, which may be put elsewhere before it gets to ``root``."""
        nodes = self.meanings.before_phases(group.nodes) or [root]
        layered = [node for node in nodes if isinstance(self.meanings[node], Through)]
        return self.recording.shape_of[(layered or nodes)[-1]]

    def _cost(self, node: fx.Node) -> Cost:  # noqa: PLR0911
        if node not in self.recording.shape_of or node.op in ("placeholder", "get_attr"):
            return Cost()
        shape, item = self.recording.shape_of[node], self._item(node)
        match self.meanings[node]:
            case Through(x, Convolution(geometry, weight, bias)):
                own = convolution_cost(geometry, shape, self.recording.shape_of[x], item)
                return total([own, *self._computed([weight] if bias is None else [weight, bias], item)])
            case Through(x, layer):
                return filter_cost(layer.geometry, shape, self.recording.shape_of[x], item)
            case Scaled(_, _, axis):
                return elementwise_cost(shape, 1, item, parameters=4 * shape[axis] if axis is not None else 0)
            case Sum(inputs):
                return elementwise_cost(shape, len(inputs), item)
            case Joined():
                return elementwise_cost(shape, 1, item)
            case Selected(_, indices):
                contiguous = indices == tuple(range(indices[0], indices[0] + len(indices))) if indices else True
                return Cost() if contiguous else elementwise_cost(shape, 1, item)
            case Same() if self.is_wasted(node):
                return elementwise_cost(shape, 1, item)
            case None:  # at least as much as to read and to write
                return elementwise_cost(shape, 1, item)
            case _:
                return Cost()

    def passes(self, node: fx.Node) -> bool:
        """Whether the node only passes on what it is given, as it is or elsewhere, at no cost that could be saved."""
        return isinstance(self.meanings[node], Same | Rearranged) and not self.is_wasted(node)

    def is_wasted(self, node: fx.Node) -> bool:
        """Whether the node computes what it is given, number by number: adds 0, multiplies by 1."""
        return isinstance(self.meanings[node], Same) and operator_of(node) in ARITHMETIC

    def computing(self, node: fx.Node) -> fx.Node:
        """Return the node that computes the value of ``node``, be it in vain."""
        while isinstance(meaning := self.meanings.get(node), Same) and not self.is_wasted(node):
            node = meaning.input
        return node

    def _computed(self, names: Iterable[str], item: int) -> Iterator[Cost]:
        constants = self.recording.constants
        computed = filter(constants.is_computed, names)
        return (elementwise_cost(constants.shape(name), 1, item) for name in computed)

    def _item(self, node: fx.Node) -> int:
        return self.recording.dtype_of[node].itemsize

    def is_computed(self, expression: Expression) -> bool:
        """Whether a tensor of the expression is computed in every forward."""
        return any(map(self.recording.constants.is_computed, expression.tensor_names))


# terms -> groups: which branches of a region become one convolution.


Refuse = Callable[[NotAffine, fx.Node, Cost | None, Cost | None], None]


class _Merging:
    """Merges terms of ``root``, those of one source after another, into groups that are one map each."""

    def __init__(self, root: fx.Node, estimate: Estimate, refuse: Refuse) -> None:
        self.root = root
        self.estimate = estimate
        self.refuse = refuse
        self.shape = estimate.recording.shape_of[root]
        self._merge = cache(self._merged)

    def run(self, terms: Sequence[Term]) -> list[Group]:
        """Begin with every term for itself, and merge the two groups that save most until no two save anything."""
        groups, whole = [Group((term,)) for term in terms], Group(tuple(terms))
        if len(groups) == 1 or self._is_at_no_cost(whole, groups):
            return [whole]
        while len(groups) > 1:
            one, other = max(combinations(groups, 2), key=lambda pair: self._saving(*pair))
            merged = self._merge(one, other)
            if isinstance(merged, NotAffine) or self._saving(one, other) <= 0:
                break
            groups[groups.index(one)] = merged
            groups.remove(other)
        for pair in combinations(groups, 2):
            self._explain(*pair)
        return groups

    def _is_at_no_cost(self, whole: Group, groups: Sequence[Group]) -> bool:
        """Whether the sum of all is no more work than the largest alone: nothing can be better than that."""
        try:
            return self._price(whole) <= max(map(self._price, groups))
        except NotAffine:
            return False

    def _merged(self, one: Group, other: Group) -> Group | NotAffine:
        merged = Group((*one.terms, *other.terms))
        try:
            _ = merged.expression
        except NotAffine as error:
            return error
        return merged

    def _saving(self, one: Group, other: Group) -> float:
        merged = self._merge(one, other)
        if isinstance(merged, NotAffine):
            return -1.0
        added = elementwise_cost(self.shape, 2, self.estimate.recording.dtype_of[self.root].itemsize)
        apart, after = total([self._cost(one), self._cost(other), added]), self._cost(merged)
        better = self.estimate.is_better(after, apart)
        return self.estimate.price(apart) - self.estimate.price(after) if better else -1.0

    def _price(self, group: Group) -> float:
        return self.estimate.price(self._cost(group))

    def _cost(self, group: Group) -> Cost:
        if group.of_source is not None:
            return Cost()
        group = self.of_chosen(group)
        return self.estimate.of_map(group.expression, group.source, self.shape)

    def of_chosen(self, group: Group) -> Group:
        """Return a group that begins with a choice of channels as one of these, where that is less work: the choice is
        often a view, and the kernel for all channels has numbers for each of them.
        """
        meanings, read = self.estimate.meanings, channels_read(group.expression)
        chosen = {node for node in group.nodes if isinstance(meanings[node], Selected)} if read is not None else set()
        firsts = {node for node in chosen if meanings.origin(inputs_of(meanings[node])[0]) is group.source}
        if len(firsts) != 1:
            return group
        behind = replace(group, chosen=firsts.pop())
        costs = (self.estimate.of_map(each.expression, each.source, self.shape) for each in (behind, group))
        less, whole = map(self.estimate.price, costs)
        return behind if less + self.estimate.price(self.estimate.of_nodes([behind.source])) < whole else group

    def _explain(self, one: Group, other: Group) -> None:
        """Say why two groups of one source stay apart."""
        merged = self._merge(one, other)
        if isinstance(merged, NotAffine):
            self.refuse(merged, self.root, None, None)
        elif one.convolves and other.convolves:
            error = NotAffine("cost", "as one convolution these branches are predicted to gain nothing")
            apart = self.estimate.of_groups((one, other), self.root)
            self.refuse(error, self.root, apart, self._cost(merged))


@dataclass(frozen=True, eq=False)
class Region:
    """``root`` is the sum of the groups, or these joined, of which those ``written`` become a convolution each.

    ``working`` are the nodes that compute, ``passing`` those among them that do not act on channels: no-ops, and what
    only puts values elsewhere, which stays where it is (``ops.channels``).
    """

    root: fx.Node
    groups: tuple[Group, ...]
    working: Nodes
    passing: Nodes
    written: tuple[Group, ...] = ()

    @property
    def nodes(self) -> Nodes:
        """Every node of the region."""
        return self.working | self.passing

    def keys(self, names: Mapping[fx.Node, str]) -> set[Key]:
        """Return what a plan knows its sites by."""
        root = names[self.root]
        return {(names[g.source], root, frozenset(names[node] for node in g.nodes)) for g in self.written}

    @property
    def joined_along(self) -> int | None:
        """The axis along which the groups are joined; None where they are added."""
        if not self.groups[0].span:
            return None
        return 1 if self.groups[0].expression.geometry.ndim else -1

    @property
    def maps(self) -> tuple[Expression, ...]:
        """What is written."""
        return tuple(group.expression for group in self.written)

    @property
    def is_writable(self) -> bool:
        """Whether each group is a convolution, or a number times its source."""
        return all(group.of_source is not None or group.convolves for group in self.groups)


@dataclass(frozen=True)
class Piece:
    """A part of a region between nodes that put values elsewhere, and stay: what computes ``root`` from ``source``.

    The one that is ``layered`` becomes the convolution of the region, the others what they are given.
    """

    source: fx.Node
    root: fx.Node
    nodes: Nodes
    layered: bool


def pieces(region: Region, meanings: Meanings) -> list[Piece]:
    """Return the pieces of a region in which something puts values elsewhere, in order; nearly always there are none.

    What rearranges has one source, so all that comes before it in the graph is before it, and all else behind it.
    """
    order = meanings.recording.order
    nodes = sorted(region.nodes, key=order.__getitem__)
    ends = [node for node in nodes if node in region.passing and isinstance(meanings[node], Rearranged)]
    if not ends:
        return []
    found, source = [], region.groups[0].source
    for end in (*ends, None):
        place = order[end] if end is not None else len(order)
        within = [node for node in nodes if order[node] < place]
        nodes = nodes[len(within) + 1 :]
        if within:
            layered = any(isinstance(meanings[node], Through) for node in within)
            found.append(Piece(source, within[-1], frozenset(within), layered))
        source = end if end is not None else source
    inside = set(meanings.before_phases(region.nodes))
    before = [index for index, piece in enumerate(found) if piece.root in inside]
    last = max((index for index in before if found[index].layered), default=before[-1])
    return [replace(piece, layered=index == last) for index, piece in enumerate(found)]


def region_of(root: fx.Node, terms: Sequence[Term], estimate: Estimate, refuse: Refuse) -> Region:
    """Return the region of these terms, without the no-ops at its end: they stay, after the one convolution."""
    by_source: dict[object, list[Term]] = defaultdict(list)
    for term in terms:
        by_source[term.source, term.span].append(term)
    merging = _Merging(root, estimate, refuse)
    groups = tuple(merging.of_chosen(group) for each in by_source.values() for group in merging.run(each))
    nodes = frozenset(chain.from_iterable(group.nodes for group in groups))
    undone = frozenset[fx.Node]().union(*(term.undone for group in groups for term in group.terms))
    passing = frozenset(filter(estimate.passes, nodes - undone))
    while root in passing and (value := inputs_of(estimate.meanings[root])[0]) in nodes:
        nodes, passing, root = nodes - {root}, passing - {root}, value
    return Region(root, groups, nodes - passing, passing)
