"""graph -> regions: the nodes that are together a sum of affine maps of their sources, and worth their merging.

A node belongs to the region of its readers if they agree. The largest regions are looked at first, and *cut* where they
are no such sum, where their parts are less work, and where a sum holds nothing together; then the parts are looked at
in the same way. A cut ends a region at a node, which is a source of what reads it.

Where a cut is least work is searched for. Of up to ``MOST_PLACES`` places where one can be worth anything every choice
is tried, which finds the best; of more the best one of the last ``MOST_ALONE``, and the parts are searched again. Of
choices that the estimate cannot tell apart, the one of the least arithmetic and fewest operators is taken.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain, combinations

from torch import fx

from repfuse.algebra.expression import Joined, Scaled, Selected, Sum, Through
from repfuse.algebra.geometry import NotAffine
from repfuse.algebra.layers import Offset, mixes
from repfuse.ops.meaning import Same, convolves, inputs_of
from repfuse.planning.reader import BranchReader, Ends
from repfuse.planning.region import Estimate, Refuse, Region, Term, region_of
from repfuse.plans import Cost, Measured, Policy, total
from repfuse.recording.stock import is_stock

MOST_PLACES = 4
"""Of how many places every choice is tried: a block of three layers in a row with a skip has four."""
MOST_ALONE = 16
"""At how many, the last ones, a single cut is tried where there are more: the tries grow as the layers do."""

Subgraph = tuple[fx.Node, ...]
"""Nodes in order, of which the last is the root of what is perhaps a region."""
Cuts = frozenset[fx.Node]
Note = tuple[NotAffine, fx.Node, Cost | None, Cost | None]


@dataclass(frozen=True, eq=False)
class Assessment:
    """A part that is a region: the terms of each of its nodes, and what looked fusible in it and is not."""

    region: Region
    terms: dict[fx.Node, tuple[Term, ...]]
    notes: tuple[Note, ...]


@dataclass(frozen=True, eq=False)
class Failure:
    """A part that is no region: ``node`` cannot be read through its operands, and ``cuts`` have to be made.

    Without any, it is no operation on terms at all. ``below`` says whether there is a convolution in the operands.
    """

    node: fx.Node
    error: NotAffine
    cuts: Cuts
    below: bool


@dataclass(frozen=True, eq=False)
class Division:
    """What is left of a part after ``cuts``, those included that ``failures`` make necessary.

    ``costs`` are what its parts cost, each with its root.
    """

    cuts: Cuts
    costs: frozenset[tuple[fx.Node, Cost]]
    failures: tuple[Failure, ...]

    @cached_property
    def cost(self) -> Cost:
        """What all parts cost."""
        return _total(self.costs)


class Search:
    """Searches one graph; ``read`` says what a part of it is.

    ``reader`` says what each node computes; a node that turns out to be no operation on terms loses its meaning.
    ``estimate`` is the law of cost; ``refuse`` records what looked fusible and is not; what was ``measured`` at an
    output goes before the law. ``cuts`` are those that were made, ``declined`` the outputs of what could be one layer
    and is not, being predicted to gain nothing: what that costs in parts, and as one. ``readers`` are those of each
    value, ``terms`` what it is in the region that was found.
    """

    def __init__(
        self, reader: BranchReader, estimate: Estimate, refuse: Refuse, measured: Mapping[str, Measured] | None = None
    ) -> None:
        self.recording = estimate.recording
        self.meanings = estimate.meanings
        self.reader = reader
        self.estimate = estimate
        self.refuse = refuse
        self.measured = measured or {}
        self.cuts: set[fx.Node] = set()
        self.declined: dict[str, tuple[Cost, Cost]] = {}
        self._always = Estimate(estimate.meanings, Policy.ALWAYS)
        self._notes: list[Note] = []
        self.terms: dict[fx.Node, tuple[Term, ...]] = {}
        self.read = cache(self._read)
        self._least = cache(self._least_of)
        self._source = cache(lambda node: (reader.source(node),))
        self._terms_made: dict[tuple[object, ...], tuple[Term, ...] | NotAffine] = {}
        affine = [node for node in self.recording.nodes if inputs_of(self.meanings.get(node))]
        self.readers = {node: list(self.meanings.readers(node)) for node in affine}
        self._joining = {node: self.readers[node] for node in affine if self._may_join(node)}
        self.largest = self._split(affine)

    def find(self) -> list[Region]:
        """Return the regions, in the order of the graph. Every cut makes smaller parts, so this ends."""
        found, left = list[Region](), list(self.largest)
        while left:
            part = left.pop()
            read, measured = self._as_measured(part)
            cuts = self._mended(part, read) if isinstance(read, Failure) else self._judged(part, read, measured)
            if cuts:
                self.cuts |= cuts
                left += self._split(part, cuts)
            elif isinstance(read, Failure):
                self.meanings[read.node] = None
                self._terms_made.clear()
                for law in (self.estimate, self._always):
                    law.of_node.cache_clear()
                left += self._split([node for node in part if node is not read.node])
            else:
                found.append(read.region)
                self.terms |= read.terms
                self._notes += read.notes
        for note in self._notes:
            self.refuse(*note)
        return sorted(found, key=lambda region: self.recording.order[region.root])

    def escaping(self) -> Iterator[fx.Node]:
        """Yield the values that would have merged into one of their readers if nothing else had read them."""
        for meaning in self.meanings.values():
            sources = {self.meanings.origin(x) for x in inputs_of(meaning)}
            if not isinstance(meaning, Scaled | Sum):
                continue
            for value in sources:
                roots = {term.source for other in sources - {value} for term in self.terms.get(other, ())} | sources
                branch = self.terms.get(value, ())
                alone = isinstance(meaning, Scaled) or any(term.source in roots for term in branch)
                if len(self.readers.get(value, ())) > 1 and alone and any(term.convolves for term in branch):
                    yield value

    # Who reads what, and what belongs together.

    def _may_join(self, node: fx.Node) -> bool:
        """Whether all that reads a value is known, and always does; a refusal where not and they would have merged."""
        known = [user for user in self.readers[node] if node in inputs_of(self.meanings.get(user))]
        marks = {user: mark for user in known if (mark := self.recording.between(node, user)) is not None}
        for user, mark in marks.items():
            if isinstance(self.meanings[user], Scaled | Sum) or convolves(self.meanings[user]):
                self._notes.append((NotAffine(*mark), user, None, None))
        return known == self.readers[node] and not marks and node not in self.recording.escaping

    def _split(self, nodes: Sequence[fx.Node], cuts: Cuts = frozenset()) -> list[Subgraph]:
        """Return what cuts leave, the last root first: a node is of the part of its readers, if they agree.

        No-ops on what is cut are of none.
        """
        roots: dict[fx.Node, fx.Node] = {}
        parts: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in reversed(nodes):
            found = {roots.get(reader) for reader in self._joining.get(node, ())} if node not in cuts else set()
            root = found.pop() if len(found) == 1 else None
            roots[node] = root or node
            if root is None or self.estimate.computing(node) not in cuts:
                parts[roots[node]].append(node)
        return [tuple(reversed(part)) for part in parts.values()]

    def _cuts_at(self, values: Iterable[fx.Node], part: Subgraph) -> Cuts:
        return frozenset(map(self.estimate.computing, values)).intersection(part[:-1])

    # What a part is.

    def _read(self, part: Subgraph, *, always: bool = False) -> Assessment | Failure:
        """Return what a part is, by the law of the search or, where that is to merge ``always``, by the other one."""
        law = self._always if always else self.estimate
        terms: dict[fx.Node, tuple[Term, ...]] = {}
        for node in part:
            inputs = inputs_of(self.meanings[node])
            operands = {x: terms.get(x) or self._source(self.meanings.origin(x)) for x in inputs}
            made = self._made(node, operands)
            if isinstance(made, NotAffine):
                below = any(term.convolves for each in operands.values() for term in each)
                return Failure(node, made, self._cuts_at(inputs, part), below)
            terms[node] = made
        notes: list[Note] = []
        region = region_of(part[-1], terms[part[-1]], law, lambda *note: notes.append(note))
        read = [group.source for group in region.groups if group.convolves]
        if len(set(map(self.recording.memory.of, read))) < len(set(read)):
            reason = "the source is overwritten between its branches"
            notes.append((NotAffine("in-place", reason), part[-1], None, None))
        return Assessment(region, terms, tuple(notes))

    def _made(self, node: fx.Node, operands: Mapping[fx.Node, tuple[Term, ...]]) -> tuple[Term, ...] | NotAffine:
        """Return what a node makes of its operands, computed once: parts that begin alike are alike up to there."""
        key = (node, *map(id, operands.values()))
        if key not in self._terms_made:
            try:
                self._terms_made[key] = self.reader.terms(node, operands.__getitem__)
            except NotAffine as error:
                self._terms_made[key] = error.with_traceback(None)  # with which all frames would live on
        return self._terms_made[key]

    def _least_of(self, region: Region) -> Cost:
        """Return the cost of a region as it is, or as groups, whichever is less."""
        least = self.estimate.of_nodes(region.working)
        if region.is_writable and any(group.convolves for group in region.groups):
            merged = self.estimate.of_groups(region.groups, region.root)
            least = merged if self.estimate.is_better(merged, least) else least
        return least

    # Where to cut it: where it is no region, where less is to be done in parts, where a sum holds nothing together.

    def _mended(self, part: Subgraph, failure: Failure) -> Cuts:
        """Return where to cut what cannot be read."""
        self._say_why(failure)
        if isinstance(failure.error, Ends) and 1 < len(failure.cuts) <= MOST_PLACES:
            return self._least_cuts(part, failure)
        if failure.error.code == "several-sources" or isinstance(failure.error, Ends) or not failure.cuts:
            return failure.cuts  # no cut before what it reads would help
        shifts = self._shifts(part) if failure.error.code == "shift-before-padding" else ()
        best = self.best(part, before=failure.node, beside=shifts)
        for each in best.failures:
            self._say_why(each)
        return best.cuts

    def _least_cuts(self, part: Subgraph, failure: Failure) -> Cuts:
        """Return those of the cuts that leave least work: where one operand cannot be read on, others may be."""
        tried = self._tried(part, sorted(failure.cuts, key=part.index), range(1, len(failure.cuts) + 1))
        return min(tried, key=lambda each: self.estimate.price(each.cost)).cuts

    def _shifts(self, part: Subgraph) -> Iterator[fx.Node]:
        """Yield what adds a constant to what no layer computed: a scale after it is one of the layer that pads."""
        below = set[fx.Node]()
        for node in part:
            meaning = self.meanings[node]
            if isinstance(meaning, Through) or not below.isdisjoint(inputs_of(meaning)):
                below.add(node)
            elif isinstance(meaning, Scaled) and isinstance(meaning.by, Offset):
                yield node

    def _say_why(self, failure: Failure) -> None:
        """Record why a node ends its operands' regions, where a layer is near that one might have hoped to merge."""
        layered = convolves(self.meanings[failure.node])
        near = (  # a pad stands before a layer
            failure.below or layered or any(convolves(self.meanings.get(x)) for x in self.readers[failure.node])
        )
        # A layer on a residual sum is no place where anybody looks for a merge.
        expected = isinstance(failure.error, Ends) or (layered and failure.error.code == "several-sources")
        if near and not expected:
            self.refuse(failure.error, failure.node, None, None)

    def _as_measured(self, part: Subgraph) -> tuple[Assessment | Failure, Measured | None]:
        """Return a part as what was measured wants it, if that was of the whole of it."""
        name = self.recording.names[self.estimate.computing(part[-1])]
        measured = self.measured.get(name) if name not in self.declined else None  # of the whole, not of what is left
        read = self.read(part, always=True) if measured and measured.speedup > 1 else self.read(part)
        for error, _, apart, whole in read.notes if isinstance(read, Assessment) else ():
            if error.code == "cost" and apart and whole:
                self.declined.setdefault(name, (apart, whole))
                measured = None
        return read, measured

    def _judged(self, part: Subgraph, read: Assessment, measured: Measured | None) -> Cuts:
        """Return where to cut a region: a part may be better left to itself."""
        region = read.region
        if len(region.groups) > 1 and (loose := self._loose(part, read)) is not None:
            return loose
        return self._weighed(part, region, measured) if len(region.working) > 1 else frozenset()

    def _loose(self, part: Subgraph, read: Assessment) -> Cuts | None:
        """Return where to cut off the branches that merge with no other, or all; None where all need this root."""
        root, groups = part[-1], read.region.groups
        meaning = self.meanings[root]
        scales = isinstance(meaning, Sum) and len(meaning.inputs) == 1 and read.region.is_writable
        if scales or not isinstance(meaning, Sum | Same):
            return None  # each branch takes its part of a factor
        alone = []
        for group in groups:
            others = frozenset(chain.from_iterable(other.nodes for other in groups if other is not group))
            if len(group.terms) == 1 and group.of_source is None and group.terms[0].top not in others:
                alone.append(group.terms[0].top)
        inputs = inputs_of(meaning)
        operands = (index for index, x in enumerate(inputs) for _ in read.terms.get(x, (x,)))
        place = {id(term): operand for term, operand in zip(read.terms[root], operands, strict=True)}
        together = any(len({place[id(term)] for term in group.terms}) > 1 for group in groups)
        if (read.region.is_writable or not together) and any(map(self.estimate.is_wasted, read.region.nodes)):
            return None  # what is added in vain goes with the sum
        if alone:
            self._notes += read.notes
        return (self._cuts_at(alone, part) or None) if together else self._cuts_at((*alone, *inputs), part)

    def _weighed(self, part: Subgraph, region: Region, measured: Measured | None) -> Cuts:
        """Apply the law of cost, or what was measured: return where less is to be done in parts, or nothing."""
        apart = self._cuts_at(inputs_of(self.meanings[region.root]), part)
        if not region.is_writable:
            reason = NotAffine("no-convolution", "a sum of skips and normalisations without a convolution")
            self.refuse(reason, region.root, None, None)
            return apart if len(region.groups) > 1 else frozenset()
        if measured and measured.speedup > 1:
            return frozenset()
        before = self.estimate.of_nodes(region.working)
        after = self.estimate.of_groups(region.groups, region.root)
        better = self.best(part, fewest=1 if measured else 0) if any(self.places(part)) else None
        if better and better.cuts and (measured or self.estimate.is_better(better.cost, before)):
            reason = NotAffine("cost", str(measured or "as one layer these are predicted to gain nothing"))
            self._decline(region, better.cost, after)
            for cut in sorted(better.cuts, key=self.recording.order.__getitem__):
                self.refuse(reason, self.readers[cut][0], better.cost, after)
            return better.cuts
        if measured or not self.estimate.is_better(after, before):
            reason = NotAffine("cost", str(measured or "one convolution is predicted to gain nothing here"))
            self._decline(region, before, after)
            calls = {self.recording.call_of[node] for node in region.working}
            if before.launches > 1 and len(calls) > 1:  # nobody looks for a merge within one operator, or one module
                self.refuse(reason, region.root, before, after)
            return apart
        return frozenset()

    def _decline(self, region: Region, apart: Cost, whole: Cost) -> None:
        self.declined.setdefault(self.recording.names[region.root], (apart, whole))

    # The cuts that are least work.

    def best(
        self, part: Subgraph, before: fx.Node | None = None, *, beside: Iterable[fx.Node] = (), fewest: int = 0
    ) -> Division:
        """Return the division that is least work, by at least so many cuts: at places, and ``beside`` them at these.

        Of too many places, those nearest ``before`` a node are tried, if it is given.
        """
        places = sorted({*self.places(part), *beside}, key=part.index)
        if before is not None and len(places) > MOST_PLACES:
            places = [place for place in places if part.index(place) < part.index(before)][-MOST_PLACES:]
        most = len(places) if len(places) <= MOST_PLACES else 1
        tried = self._tried(part, places[-MOST_ALONE:], range(fewest, most + 1))
        least = min(tried, key=lambda each: (self.estimate.price(each.cost), len(each.cuts)))
        alike = (each for each in tried if each.cuts and not self._beats(least, each))
        return min(alike, key=self._work, default=least)

    def _tried(self, part: Subgraph, places: Sequence[fx.Node], counts: Iterable[int]) -> list[Division]:
        """Return what is left by each choice of so many of the places."""
        choices = chain.from_iterable(combinations(places, count) for count in counts)
        return [self.divided(part, frozenset(choice)) for choice in choices]

    def _work(self, division: Division) -> tuple[float, ...]:
        return division.cost.macs, division.cost.launches, self.estimate.price(division.cost)

    def _beats(self, one: Division, other: Division) -> bool:
        """Whether one choice is better in that in which they differ."""
        return self.estimate.is_better(_total(one.costs - other.costs), _total(other.costs - one.costs))

    def divided(self, part: Subgraph, cuts: Cuts) -> Division:
        """Return what these cuts leave."""
        costs, failures = set[tuple[fx.Node, Cost]](), list[Failure]()
        left = self._split(part, cuts)
        while left:
            each = left.pop()
            read = self.read(each)
            if isinstance(read, Assessment):
                costs.add((each[-1], self._least(read.region)))
                continue
            failures.append(read)
            if not read.cuts:
                costs.add((read.node, self.estimate.of_nodes([read.node])))
                each = tuple(node for node in each if node is not read.node)
            cuts |= read.cuts
            left += self._split(each, read.cuts)
        return Division(cuts, frozenset(costs), tuple(failures))

    def places(self, part: Subgraph) -> Iterator[fx.Node]:
        """Yield the nodes at which a cut may be worth anything: between layers, those that only move values included.

        What scales or shifts a convolution costs nothing in it, branches of a sum are told apart without a cut, and a
        module of PyTorch's that pads and convolves goes on as one.
        """
        inside, below, above = set(part), set[fx.Node](), set[fx.Node]()
        for node in part:
            layered = isinstance(self.meanings[node], Through) or self._is_moved(node)
            if layered or not below.isdisjoint(inputs_of(self.meanings[node])):
                below.add(node)
        for node in reversed(part):
            if node in above or isinstance(self.meanings[node], Through | Selected | Joined):
                above.update(inside.intersection(inputs_of(self.meanings[node])))
        for node in part[:-1]:
            if node in below and node in above and not self._goes_with_its_readers(node):
                yield node

    def _is_moved(self, node: fx.Node) -> bool:
        """Whether a reader puts the value elsewhere, for a layer after that."""
        readers = map(self.meanings.get, self.readers[node])
        return any(isinstance(reader, Through) and not mixes(reader.layer) for reader in readers)

    def _goes_with_its_readers(self, node: fx.Node) -> bool:
        meaning, readers = self.meanings[node], [self.meanings[reader] for reader in self.readers[node]]
        scaled = all(isinstance(reader, Scaled | Same) for reader in readers)
        added = all(isinstance(reader, Sum) for reader in readers)
        pointless = added or (scaled and (convolves(meaning) or isinstance(meaning, Scaled)))
        return isinstance(meaning, Same) or pointless or self._is_within_stock(node)

    def _is_within_stock(self, node: fx.Node) -> bool:
        call = self.recording.call_of[node]
        together = all(self.recording.call_of[reader] is call for reader in self.readers[node])
        return together and bool(call.path) and is_stock(self.recording.modules[call.path])


def _total(costs: Iterable[tuple[fx.Node, Cost]]) -> Cost:
    return total(cost for _, cost in costs)
