"""One region: nodes that are together a sum of affine maps of their sources."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations

from torch import fx

from repfuse.algebra.expression import Through
from repfuse.algebra.geometry import NotAffine
from repfuse.ops.meaning import Meaning, Rearranged, before_phases, inputs_of
from repfuse.planning.cost import elementwise_cost
from repfuse.planning.estimate import Estimate
from repfuse.planning.terms import Group, Nodes, Term
from repfuse.plans import Cost

# terms -> groups: which branches of a region become one convolution.


Refuse = Callable[[NotAffine, fx.Node, Cost | None, Cost | None], None]


def grouped(terms: Sequence[Term], root: fx.Node, estimate: Estimate, refuse: Refuse) -> tuple[Group, ...]:
    """Partition the terms of ``root`` into groups that are one map each, each worth its merging."""
    by_source: dict[fx.Node, list[Term]] = defaultdict(list)
    for term in terms:
        by_source[term.source].append(term)
    groups: list[Group] = []
    for members in by_source.values():
        groups += _Merging(root, estimate, refuse).run(members)
    return tuple(groups)


class _Merging:
    """Merges the terms of one source."""

    def __init__(self, root: fx.Node, estimate: Estimate, refuse: Refuse) -> None:
        self.root = root
        self.estimate = estimate
        self.refuse = refuse
        self.shape = estimate.recording.shape_of[root]
        self.add = elementwise_cost(self.shape, 2, estimate.recording.dtype_of[root].itemsize)
        self.together: dict[tuple[Group, Group], Group | NotAffine] = {}

    def run(self, terms: Sequence[Term]) -> list[Group]:
        """Begin with every term for itself, and merge the two groups that save most until no two save anything."""
        groups = [Group((term,)) for term in terms]
        if len(groups) == 1 or self._all_at_no_cost(groups):
            return [Group(tuple(terms))]
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

    def _all_at_no_cost(self, groups: Sequence[Group]) -> bool:
        """Whether the sum of all is no more work than the largest alone: nothing can be better than that."""
        total = Group(tuple(term for group in groups for term in group.terms))
        try:
            return self._price(total) <= max(map(self._price, groups))
        except NotAffine:
            return False

    def _merge(self, one: Group, other: Group) -> Group | NotAffine:
        if (one, other) not in self.together:
            merged = Group((*one.terms, *other.terms))
            try:
                _ = merged.expression
                self.together[one, other] = merged
            except NotAffine as error:
                self.together[one, other] = error
        return self.together[one, other]

    def _saving(self, one: Group, other: Group) -> float:
        merged = self._merge(one, other)
        if isinstance(merged, NotAffine):
            return -1.0
        apart, after = self._cost(one) + self._cost(other) + self.add, self._cost(merged)
        better = self.estimate.is_better(after, apart)
        return self.estimate.price(apart) - self.estimate.price(after) if better else -1.0

    def _price(self, group: Group) -> float:
        return self.estimate.price(self._cost(group))

    def _cost(self, group: Group) -> Cost:
        if group.of_source is not None:
            return Cost()
        return self.estimate.of_map(group.expression, group.source, self.shape)

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
    """``root`` is the sum of the groups.

    ``working`` are the nodes that compute, ``passing`` those among them that do not act on channels: no-ops, and what
    only puts values elsewhere, which stays where it is (``ops.rows``).
    """

    root: fx.Node
    groups: tuple[Group, ...]
    working: Nodes
    passing: Nodes

    @property
    def nodes(self) -> Nodes:
        """Every node of the region."""
        return self.working | self.passing

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


def pieces(region: Region, meanings: Mapping[fx.Node, Meaning | None], order: Mapping[fx.Node, int]) -> list[Piece]:
    """Return the pieces of a region in which something puts values elsewhere, in order; nearly always there are none.

    What rearranges has one source, so all that comes before it in the graph is before it, and all else behind it.
    """
    nodes = sorted(region.nodes, key=order.__getitem__)
    ends = [node for node in nodes if isinstance(meanings[node], Rearranged)]
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
    inside = set(before_phases(region.nodes, meanings, order))
    before = [index for index, piece in enumerate(found) if piece.root in inside]
    last = max((index for index in before if found[index].layered), default=before[-1])
    return [replace(piece, layered=index == last) for index, piece in enumerate(found)]


def region_of(root: fx.Node, terms: Sequence[Term], estimate: Estimate, refuse: Refuse) -> Region:
    """Return the region of these terms, without the no-ops at its end: they stay, after the one convolution."""
    groups = grouped(terms, root, estimate, refuse)
    nodes = frozenset(chain.from_iterable(group.nodes for group in groups))
    passing = frozenset(filter(estimate.passes, nodes))
    while root in passing and (value := inputs_of(estimate.meanings[root])[0]) in nodes:
        nodes, passing, root = nodes - {root}, passing - {root}, value
    return Region(root, groups, nodes - passing, passing)
