"""region -> cuts: where to end regions within one, so that all parts together are least work.

A region may be left in parts because it is one map and no cheaper than they are, or because it is none: a layer then
reads a value that another region makes. Which values these are is searched for. Of up to ``MOST_PLACES`` places where a
cut can be worth anything every choice is tried, which finds the best; of more the best one, and the parts are searched
again. Of choices that the estimate cannot tell apart, the one of the least arithmetic and fewest operators is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain, combinations

from torch import fx

from repfuse.algebra.expression import Joined, Scaled, Selected, Sum, Through
from repfuse.algebra.geometry import NotAffine
from repfuse.algebra.layers import mixes
from repfuse.ops.meaning import Same, convolves, inputs_of
from repfuse.planning.reader import Reader
from repfuse.planning.region import Estimate, Term, region_of
from repfuse.plans import Cost
from repfuse.recording.stock import is_stock

Terms = tuple[Term, ...]

MOST_PLACES = 4
"""Of how many places every choice is tried: a block of three layers in a row with a skip has four."""


@dataclass(frozen=True)
class Failure:
    """A node that cannot be read through its operands; ``below`` says whether there is a convolution in these."""

    node: fx.Node
    error: NotAffine
    below: bool


@dataclass(frozen=True)
class Parts:
    """What is left of a region after ``cuts``, those included that ``failures`` make necessary.

    ``costs`` are what the parts cost, each with its root.
    """

    cuts: frozenset[fx.Node]
    costs: frozenset[tuple[fx.Node, Cost]]
    failures: tuple[Failure, ...]

    @property
    def cost(self) -> Cost:
        """What all parts cost."""
        return _total(self.costs)


class Cutting:
    """Tries cuts of one region: ``nodes``, in order, of which the last is the root.

    ``readers`` gives the nodes that read the value of a node.
    """

    def __init__(
        self,
        nodes: Sequence[fx.Node],
        reader: Reader,
        estimate: Estimate,
        readers: Callable[[fx.Node], Iterable[fx.Node]],
    ) -> None:
        self.nodes = nodes
        self.reader = reader
        self.estimate = estimate
        self.meanings = estimate.meanings
        self.readers = {node: list(readers(node)) for node in nodes[:-1]}
        self.inputs = {node: inputs_of(self.meanings[node]) for node in nodes}
        self._sources: dict[fx.Node, Terms] = {}
        # By the identity of terms, which they are kept for: comparing them would take as long as reading them.
        self._read: dict[tuple[object, ...], tuple[list[Terms], Terms | NotAffine]] = {}
        self._cost: dict[tuple[object, ...], tuple[Terms, Cost]] = {}

    def best(self, before: fx.Node | None = None, *, fewest: int = 0) -> Parts:
        """Return the parts that are least work, by at least so many cuts.

        Of too many places, those nearest ``before`` a node are tried, if it is given.
        """
        places = list(self.places())
        if before is not None and len(places) > MOST_PLACES:
            places = [place for place in places if self.nodes.index(place) < self.nodes.index(before)][-MOST_PLACES:]
        sizes = range(fewest, len(places) + 1) if len(places) <= MOST_PLACES else range(fewest, 2)
        choices = chain.from_iterable(combinations(places, size) for size in sizes)
        price = {parts: self.estimate.price(parts.cost) for parts in map(self.parts, choices)}
        least = min(price, key=lambda parts: (price[parts], len(parts.cuts)))
        alike = (parts for parts in price if parts.cuts and not self._beats(least, parts))
        return min(alike, key=lambda parts: (parts.cost.macs, parts.cost.launches, price[parts]), default=least)

    def _beats(self, one: Parts, other: Parts) -> bool:
        """Whether one choice is better in that in which they differ."""
        return self.estimate.is_better(_total(one.costs - other.costs), _total(other.costs - one.costs))

    def places(self) -> Iterator[fx.Node]:
        """Yield the nodes at which a cut may be worth anything: between layers, those that only move values included.

        What scales or shifts a convolution costs nothing in it, branches of a sum are told apart without a cut, and a
        module of PyTorch's that pads and convolves goes on as one.
        """
        inside = set(self.nodes)
        below, above = set[fx.Node](), set[fx.Node]()
        for node in self.nodes:
            layered = isinstance(self.meanings[node], Through) or self._is_moved(node)
            if layered or not below.isdisjoint(self.inputs[node]):
                below.add(node)
        for node in reversed(self.nodes):
            if node in above or isinstance(self.meanings[node], Through | Selected | Joined):
                above.update(inside.intersection(self.inputs[node]))
        for node in self.nodes[:-1]:
            if node in below and node in above and not self._goes_with_its_readers(node):
                yield node

    def _is_moved(self, node: fx.Node) -> bool:
        """Whether a reader puts the value elsewhere, for a layer after that."""
        readers = (self.meanings[reader] for reader in self.readers.get(node, ()))
        return any(isinstance(reader, Through) and not mixes(reader.layer) for reader in readers)

    def _goes_with_its_readers(self, node: fx.Node) -> bool:
        meaning, readers = self.meanings[node], [self.meanings[reader] for reader in self.readers[node]]
        scaled = all(isinstance(reader, Scaled | Same) for reader in readers)
        added = all(isinstance(reader, Sum) for reader in readers)
        pointless = added or (scaled and (convolves(meaning) or isinstance(meaning, Scaled)))
        return isinstance(meaning, Same) or pointless or self._is_within_stock(node)

    def _is_within_stock(self, node: fx.Node) -> bool:
        recording = self.estimate.recording
        call = recording.call_of[node]
        together = all(recording.call_of[reader] is call for reader in self.readers[node])
        return together and bool(call.path) and is_stock(recording.modules[call.path])

    def parts(self, cuts: Iterable[fx.Node]) -> Parts:
        """Return what these cuts leave."""
        made, failures = set(cuts), list[Failure]()
        while True:
            roots, known = self._roots(made), len(made)
            terms: dict[fx.Node, Terms] = {}
            for node in self.nodes:
                terms[node] = self._terms(node, terms, roots, made, failures)
            if len(made) == known:
                break
        costs = frozenset((node, self._least(node, terms[node])) for node in self.nodes if roots[node] is node)
        return Parts(frozenset(made), costs, tuple(failures))

    def _roots(self, cuts: Set[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Return the root of the part that each node belongs to: that of its readers if they agree, else itself."""
        roots = {self.nodes[-1]: self.nodes[-1]}
        for node in reversed(self.nodes[:-1]):
            of_readers = {roots[reader] for reader in self.readers[node]}
            roots[node] = node if node in cuts or len(of_readers) > 1 else of_readers.pop()
        return roots

    def _terms(
        self,
        node: fx.Node,
        terms: dict[fx.Node, Terms],
        roots: dict[fx.Node, fx.Node],
        cuts: set[fx.Node],
        failures: list[Failure],
    ) -> Terms:
        """Return the terms of a node: from the values of its operands, and as a value itself, where it has to be.

        The cuts that this makes are added to ``cuts``.
        """
        operands = {}
        for x in self.inputs[node]:
            within = x in terms and roots[x] is roots[node] and self.meanings.origin(x) not in cuts
            operands[x] = terms[x] if within else self._source(x)
        values = {x: self._source(x) for x in self.inputs[node]}
        for given in (operands, values):
            try:
                return self._read_from(node, given)
            except NotAffine as error:
                forced = {self.estimate.computing(x) for x in values} | ({node} if given is values else set())
                if not cuts.issuperset(forced := forced.intersection(self.nodes[:-1])):
                    failures.append(Failure(node, error, any(term.convolves for x in given.values() for term in x)))
                    cuts |= forced
        return (replace(self.reader.source(node), nodes=frozenset({node})),)

    def _source(self, x: fx.Node) -> Terms:
        value = self.meanings.origin(x)
        if value not in self._sources:
            self._sources[value] = (self.reader.source(value),)
        return self._sources[value]

    def _read_from(self, node: fx.Node, operands: dict[fx.Node, Terms]) -> Terms:
        """Read a node, once for the same operands."""
        key = node, *map(id, operands.values())
        if key not in self._read:
            held = list(operands.values())
            try:
                self._read[key] = held, self.reader.terms(node, operands.__getitem__)
            except NotAffine as error:
                self._read[key] = held, error
        _, found = self._read[key]
        if isinstance(found, NotAffine):
            raise found
        return found

    def _least(self, root: fx.Node, terms: Terms) -> Cost:
        """Return the cost of these terms as they are, or as groups, whichever is less."""
        key = root, id(terms)
        if key not in self._cost:
            region = region_of(root, terms, self.estimate, lambda *_: None)  # the question is hypothetical
            least = self.estimate.of_nodes(region.working)
            opaque = root in {term.source for term in terms}
            if region.is_writable and not opaque and any(group.convolves for group in region.groups):
                merged = self.estimate.of_groups(region.groups, region.root)
                least = merged if self.estimate.is_better(merged, least) else least
            self._cost[key] = terms, least
        return self._cost[key][1]


def _total(costs: Iterable[tuple[fx.Node, Cost]]) -> Cost:
    return sum((cost for _, cost in costs), Cost())
