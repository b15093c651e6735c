"""graph -> regions: the nodes that are together a sum of affine maps of their sources.

Forward over the nodes, each affine node is a list of terms, one per branch. A node belongs to the region of its
consumers if they agree; a node that something else reads too, or that cannot be merged further, is the root of a
region of its own. Ending a region at a node (a *cut*) makes that node a source of others, so the passes repeat until
nothing is cut any more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import chain

from torch import fx

from repfuse.algebra.expression import Scaled, Sum
from repfuse.algebra.geometry import NotAffine
from repfuse.ops.channels import only_measures
from repfuse.ops.meaning import Passage, Same, convolves, inputs_of
from repfuse.planning.cutting import Cutting, Parts
from repfuse.planning.reader import Ends, Reader
from repfuse.planning.region import Estimate, Refuse, Region, Term, region_of
from repfuse.plans import Cost, Measured, Policy

_Note = tuple[NotAffine, fx.Node, Cost | None, Cost | None]


class Regions:
    """Finds the regions of a graph.

    ``reader`` says what each node computes; a node that turns out to be no operation on terms loses its meaning.
    ``estimate`` is the law of cost; ``refuse`` records what looked fusible and is not; what was ``measured`` at an
    output goes before the law.
    """

    def __init__(
        self,
        reader: Reader,
        estimate: Estimate,
        refuse: Refuse,
        measured: Mapping[str, Measured] | None = None,
    ) -> None:
        self.recording = estimate.recording
        self.meanings = estimate.meanings
        self.reader = reader
        self.estimate = estimate
        self.refuse = refuse
        self.measured = measured or {}
        self.declined: dict[str, tuple[Cost, Cost]] = {}
        self._always = Estimate(estimate.meanings, Policy.ALWAYS)
        self._roots: dict[fx.Node, fx.Node] = {}
        self._terms: dict[fx.Node, tuple[Term, ...]] = {}
        self._operand_of: dict[fx.Node, list[int]] = {}  # for each term of a sum, the place of its operand
        self._cuts: set[fx.Node] = set()
        self._members: dict[fx.Node, list[fx.Node]] = {}  # the nodes of each root, in order
        self._parted: set[fx.Node] = set()  # the roots of what this pass takes apart
        self._best_of: dict[tuple[object, ...], Parts] = {}
        self._searched: set[fx.Node] = set()  # those among them whose cuts were searched for
        self._changed = True
        self._doubted: set[fx.Node] = set()
        self._doubts: list[_Note] = []
        self._notes: dict[fx.Node, list[_Note]] = {}

    def find(self) -> list[Region]:
        """Return the regions, in the order of the graph. Every pass cuts a node or is the last, so this ends."""
        regions: list[Region] = []
        while self._changed:
            self._changed, self._notes = False, {}
            self._parted.clear()
            self._searched.clear()
            self._partition()
            self._terms = {}
            for node in self.recording.nodes:
                if node in self._roots:
                    self._terms[node] = self._read(node)
            roots = self._members.keys() - self._parted
            regions = [self._judge(node) for node in self._roots if node in roots]
        for root in self._notes:
            self._say(root)
        for note in self._doubts:
            self.refuse(*note)
        return sorted(regions, key=lambda region: self.recording.order[region.root])

    def escaping(self) -> Iterator[fx.Node]:
        """Yield the values that would have merged into one of their readers if nothing else had read them."""
        for meaning in self.meanings.values():
            sources = {self.meanings.origin(x) for x in inputs_of(meaning)}
            if not isinstance(meaning, Scaled | Sum):
                continue
            for value in sources:
                readers = list(self._readers(value))
                roots = {term.source for other in sources - {value} for term in self._terms.get(other, ())} | sources
                branch = self._terms.get(value, ())
                alone = isinstance(meaning, Scaled) or any(term.source in roots for term in branch)
                if len(readers) > 1 and alone and any(term.convolves for term in branch):
                    yield value

    def _cut(self, node: fx.Node) -> None:
        computing = self.estimate.computing(node)
        if computing not in self._cuts and inputs_of(self.meanings.get(computing)):
            self._cuts.add(computing)
            self._changed = True

    def _partition(self) -> None:
        """Give every affine node the root of its region: that of its consumers if they agree, else itself."""
        self._roots = {}
        for node in reversed(self.recording.nodes):
            if not inputs_of(self.meanings.get(node)):
                continue
            roots = {self._root_of_reader(node, user) for user in self._readers(node)}
            if node in self.recording.escaping:
                roots.add(None)
            root = roots.pop() if len(roots) == 1 else None
            self._roots[node] = node if root is None or node in self._cuts else root
        self._members = defaultdict(list)
        for node in reversed(self._roots):
            self._members[self._roots[node]].append(node)

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield who reads the value of ``node``, through what only hands it on."""
        for user in node.users:
            if isinstance(self.meanings.get(user), Passage):
                yield from self._readers(user)
            elif not self.meanings.reads_nothing(user) and not only_measures(user, node):
                yield user

    def _root_of_reader(self, node: fx.Node, user: fx.Node) -> fx.Node | None:
        known = node in inputs_of(self.meanings.get(user)) and self._is_certain(node, user)
        return self._roots[user] if known else None

    def _is_certain(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether ``user`` always reads the value of ``node``; a refusal where not and they would have merged."""
        mark = self.recording.between(node, user)
        if mark is not None and user not in self._doubted:
            self._doubted.add(user)
            if isinstance(self.meanings[user], Scaled | Sum) or convolves(self.meanings[user]):
                self._doubts.append((NotAffine(*mark), user, None, None))
        return mark is None

    def _read(self, node: fx.Node) -> tuple[Term, ...]:
        """Return the terms of a node; where its operands cannot be looked through, its region is taken apart."""
        inputs = inputs_of(self.meanings[node])
        try:
            return self._read_from(node, self._operands(node))
        except NotAffine as error:
            self._part(node, error)
        try:
            return self._read_from(node, {x: (self._source(x),) for x in inputs})
        except NotAffine:
            if not any(self._is_within(x, node) for x in inputs):
                self.meanings[node] = None
                self._changed = True
            return (self.reader.source(node),)

    def _part(self, node: fx.Node, error: NotAffine) -> None:
        """Take the region of ``node`` apart, which cannot be read as one with its operands."""
        root, below = self._roots[node], any(x.convolves for xs in self._operands(node).values() for x in xs)
        if root in self._searched:
            return  # what failed before it is read otherwise in the next pass
        if error.code == "several-sources" or isinstance(error, Ends):  # no cut before what it reads would help
            self._say_why(node, error, below=below)
            self._take_apart(node)
        elif root not in self._parted:
            self._searched.add(root)
            self._say_why(node, error, below=below)
            parts = self._best(self._cutting(root), before=node)
            for failure in parts.failures:
                self._say_why(failure.node, failure.error, below=failure.below)
            for cut in parts.cuts:
                self._cut(cut)
        self._parted.add(root)

    def _operands(self, node: fx.Node) -> dict[fx.Node, tuple[Term, ...]]:
        return {x: self._reach(x, node) for x in inputs_of(self.meanings[node])}

    def _say_why(self, node: fx.Node, error: NotAffine, *, below: bool) -> None:
        """Record why a node ends its operands' regions, where a layer is near that one might have hoped to merge."""
        layered = convolves(self.meanings[node])
        near = (
            below or layered or any(convolves(self.meanings.get(user)) for user in self._readers(node))
        )  # a pad stands before a layer
        # A layer on a residual sum is no place where anybody looks for a merge.
        if near and not isinstance(error, Ends) and not (layered and error.code == "several-sources"):
            self.refuse(error, node, None, None)

    def _best(self, cutting: Cutting, before: fx.Node | None = None, *, fewest: int = 0) -> Parts:
        """Return how a region is best taken apart, as ``Cutting.best`` finds it: once, in however many passes."""
        key = (fewest, *cutting.nodes)
        if key not in self._best_of:
            self._best_of[key] = cutting.best(before, fewest=fewest)
        return self._best_of[key]

    def _cutting(self, root: fx.Node) -> Cutting:
        return Cutting(self._members[root], self.reader, self.estimate, self._readers)

    def _read_from(self, node: fx.Node, operands: dict[fx.Node, tuple[Term, ...]]) -> tuple[Term, ...]:
        terms = self.reader.terms(node, operands.__getitem__)
        inputs = inputs_of(self.meanings[node])
        self._operand_of[node] = [index for index, x in enumerate(inputs) for _ in operands[x]]
        return terms

    def _reach(self, x: fx.Node, node: fx.Node) -> tuple[Term, ...]:
        """Return the terms of an operand of ``node``: looked through within the region, the value itself outside."""
        return self._terms[x] if self._is_within(x, node) else (self._source(x),)

    def _is_within(self, x: fx.Node, node: fx.Node) -> bool:
        """Whether an operand of ``node`` is of the same region."""
        alike = x in self._terms and self._roots[x] is self._roots[node]
        return alike and self.meanings.origin(x) not in self._cuts

    def _source(self, x: fx.Node) -> Term:
        return self.reader.source(self.meanings.origin(x))

    def _judge(self, root: fx.Node) -> Region:
        """Group the terms of a region, and cut it where a part is better left to itself."""
        if self.meanings[root] is None:
            return Region(root, (), frozenset(), frozenset())
        notes = self._notes[root] = []
        name = self.recording.names[self.estimate.computing(root)]
        measured = self.measured.get(name) if name not in self.declined else None  # of the whole, not of what is left
        law = self._always if measured and measured.speedup > 1 else self.estimate
        region = region_of(root, self._terms[root], law, lambda *note: notes.append(note))
        for error, _, apart, whole in notes:
            if error.code == "cost" and apart and whole:
                self.declined.setdefault(name, (apart, whole))
                measured = None
        memory = [(self.recording.memory.of(group.source), group.source) for group in region.groups if group.convolves]
        if len(dict(memory)) < len({source for _, source in memory}):
            reason = "the source is overwritten between its branches"
            notes.append((NotAffine("in-place", reason), root, None, None))
        if len(region.groups) > 1 and not self._holds_together(root, region):
            self._take_apart(root)
        elif len(region.working) > 1:
            self._weigh(region, measured)
        return region

    def _holds_together(self, root: fx.Node, region: Region) -> bool:
        """Cut off the branches that merge with no other; return whether what is left needs this root to merge."""
        meaning = self.meanings[root]
        if any(map(self.estimate.is_wasted, region.nodes)):
            return True  # what is added in vain goes with the sum
        scales = isinstance(meaning, Sum) and len(meaning.inputs) == 1 and region.is_writable
        if scales or not isinstance(meaning, Sum | Same):
            return True  # each branch takes its part of a factor
        for group in region.groups:
            others = frozenset(chain.from_iterable(other.nodes for other in region.groups if other is not group))
            if len(group.terms) == 1 and group.of_source is None and group.terms[0].top not in others:
                self._say(root)
                self._cut(group.terms[0].top)
        place = {id(term): operand for term, operand in zip(self._terms[root], self._operand_of[root], strict=True)}
        return any(len({place[id(term)] for term in group.terms}) > 1 for group in region.groups)

    def _weigh(self, region: Region, measured: Measured | None) -> None:
        """Apply the law of cost, or what was measured: keep the region whole, cut it where that saves most, or take it
        apart.
        """
        if not region.is_writable:
            reason = NotAffine("no-convolution", "a sum of skips and normalisations without a convolution")
            self.refuse(reason, region.root, None, None)
            if len(region.groups) > 1:
                self._take_apart(region.root)
            return
        if measured and measured.speedup > 1:
            return
        before = self.estimate.of_nodes(region.working)
        after = self.estimate.of_groups(region.groups, region.root)
        cutting = self._cutting(self._roots[region.root])
        better = self._best(cutting, fewest=1 if measured else 0) if any(cutting.places()) else None
        if better and better.cuts and (measured or self.estimate.is_better(better.cost, before)):
            reason = NotAffine("cost", str(measured or "as one layer these are predicted to gain nothing"))
            self._decline(region, better.cost, after)
            for cut in sorted(better.cuts, key=self.recording.order.__getitem__):
                self.refuse(reason, next(self._readers(cut)), better.cost, after)
                self._cut(cut)
        elif measured or not self.estimate.is_better(after, before):
            reason = NotAffine("cost", str(measured or "one convolution is predicted to gain nothing here"))
            self._decline(region, before, after)
            calls = {self.recording.call_of[node] for node in region.working}
            if before.launches > 1 and len(calls) > 1:  # nobody looks for a merge within one operator, or one module
                self.refuse(reason, region.root, before, after)
            self._take_apart(region.root)

    def _decline(self, region: Region, apart: Cost, whole: Cost) -> None:
        self.declined.setdefault(self.recording.names[region.root], (apart, whole))

    def _take_apart(self, root: fx.Node) -> None:
        for operand in inputs_of(self.meanings[root]):
            self._cut(operand)

    def _say(self, root: fx.Node) -> None:
        """Record why branches of this region stay apart: in the last pass, or where they are now cut off for good."""
        for note in self._notes[root]:
            self.refuse(*note)
