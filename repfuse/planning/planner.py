"""module -> plan: which regions become one convolution each, which do not, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from repfuse.algebra.evaluation import border_takes_weights, check_borders
from repfuse.algebra.expression import Expression, Identity, Scaled, Sum, branches, homogeneous, layers, through
from repfuse.algebra.geometry import NotAffine
from repfuse.algebra.layers import Convolution, Layer, Normalisation, mixes
from repfuse.algebra.transposed import TransposedGeometry
from repfuse.memory import collecting_later
from repfuse.networks import as_inputs, device_of, using_threads
from repfuse.ops.meaning import Passage, Rearranged, Same, convolves, inputs_of
from repfuse.ops.sums import normalises
from repfuse.ops.table import Meanings
from repfuse.planning.cost import TOLD_APART, WORTH_THE_CLASS
from repfuse.planning.edits import Fused, Layout, divides, large_among, overflows
from repfuse.planning.layout import LayingOut
from repfuse.planning.reader import BranchReader
from repfuse.planning.region import Estimate, Group, Region
from repfuse.planning.search import Failure, Search
from repfuse.plans import Cost, Measured, Plan, Policy, Refusal, Site, total
from repfuse.recording.arguments import Arguments, description
from repfuse.recording.constants import called, lookup
from repfuse.recording.recording import Recording, record


def plan(
    module: nn.Module,
    example_inputs: Sequence[Any] | Tensor,
    policy: Policy = Policy.COST,
    *,
    keep_class: bool | None = None,
    keep_affine: bool = False,
) -> Plan:
    """Find what repfuse would rewrite in ``module``, without changing it.

    ``example_inputs`` are the positional arguments of one call, or the one tensor that it takes; their shapes decide
    the costs, ``policy`` what to make of these. The network is run on them, and on others like them of other sizes, as
    far as it takes these. ``keep_class`` says whether the outermost module goes on being what it is, whatever that
    leaves undone; without it, it does where little is to be gained. ``keep_affine`` leaves a BatchNorm behind each
    convolution that is merged. Raises RepfuseError where the model does not take the example.
    """
    arguments = Arguments(as_inputs(example_inputs))
    with collecting_later(), using_threads(1):  # the operations are not done, and many
        planner = Planner(record(module, arguments), Policy(policy), keep_class=keep_class, keep_affine=keep_affine)
        return planner.plan(description(arguments.args))


class Planner:
    """Plans one recorded network, by ``policy``.

    ``matching_borders`` says for which layers another plan found that they pad with what lies beyond the border, and
    ``overflowing`` where it refused weights that would be too large; without the first, the weights are asked. For
    ``keep_class`` and ``keep_affine`` see ``plan``, for ``measured`` ``repfuse.plans.Plan``. ``declined`` are the
    outputs of what could be one layer and is not, being predicted to gain nothing: what that costs in parts, and as
    one.
    """

    def __init__(
        self,
        recording: Recording,
        policy: Policy = Policy.COST,
        matching_borders: Collection[str] | None = None,
        overflowing: Collection[str] = (),
        *,
        keep_class: bool | None = None,
        keep_affine: bool = False,
        measured: Sequence[Measured] = (),
    ) -> None:
        self.recording = recording
        self.policy = policy
        self.keep_class = keep_class
        self.keep_affine = keep_affine
        self.measured = {each.output: each for each in measured}
        self.matching_borders = matching_borders
        self.overflowing = overflowing
        self.refusals: dict[tuple[str, str], Refusal] = {}
        self.tensors = lookup(recording.module, recording.constants)
        self._laid_out: tuple[list[Region], Layout] = ([], Layout())
        self._matching: set[str] = set()
        self._read()
        while self._takes_back(self.lay_out(self.candidates)):
            self._read()
        if keep_class is None:  # settled for any part of the sites, too, which alone may gain less
            self.keep_class = all(block.path for block in self._laid_out[1].blocks)

    def _takes_back(self, layout: Layout) -> bool:
        """Whether less is relied on than was planned with: what has no place may hide what has one.

        First nothing merges any more across the borders of modules whose calls are not alike: what had no place because
        of that is then not planned at all.
        """
        recording = self.recording
        if layout.sized - recording.sized:
            recording.sized |= layout.sized
            return True
        refused = {call: mark for call, mark in layout.refused.items() if call not in recording.marks}
        unlike = layout.unlike - recording.closed - {""}
        for path in unlike:
            recording.close(path)
        for call, mark in refused.items() if not unlike else ():
            recording.leave_alone(call, mark)
        return bool(refused or unlike)

    def _read(self) -> None:
        """Read what the nodes mean, by what the recording says now, and find what can be merged of them."""
        self.meanings = Meanings(self.recording, self.refuse)
        self.estimate = Estimate(self.meanings, self.policy)
        self._searched = self.search()
        self._regions = self._searched.find()
        self.declined = self._searched.declined
        self.candidates = self._writable()

    def plan(self, arguments: Any) -> Plan:
        """Return the plan; ``arguments`` describe those that the network was recorded with."""
        sites = self.sites()
        if not self.keep_affine:
            self._name_norms()
        return Plan(
            sites,
            tuple(self.refusals.values()),
            self.policy,
            self.recording.fingerprint(),
            arguments,
            tuple(sorted(self._matching)),  # of readings that were taken back, too: they led to this one
            bool(self.keep_class),
            self.keep_affine,
            tuple(self.measured.values()),
            live=self,
        )

    def sites(self, layout: Layout | None = None) -> tuple[Site, ...]:
        """Return every convolution that is to be written: those of ``layout``, else all that there can be."""
        return tuple(map(self._site, (layout or self.lay_out(self.candidates)).fused))

    def _writable(self) -> list[Region]:
        """Return every region of which a group is worth a convolution."""
        for node in self._searched.escaping():
            self.refuse(NotAffine("value-escapes", "its result is also read elsewhere"), node)
        found = (replace(x, written=tuple(g for g in x.groups if self._is_site(x, g))) for x in self._regions)
        there = [region for region in found if region.written and self._holds(region)]
        if self.matching_borders is not None:  # it replays, and an earlier plan says which of them fit
            return [region for region in there if self.recording.where(region.root) not in self.overflowing]
        expressions = (group.expression for region in there for group in region.written)
        stored = self.recording.constants.floating_leaves(name for each in expressions for name in each.tensor_names)
        quotients = any(map(divides, self.meanings.values()))
        large = None if quotients else large_among({name: self.tensors(name) for name in stored})
        return [region for region in there if self._fits(region, large)]

    def search(self) -> Search:
        """Return what finds the regions."""
        reader = BranchReader(self.meanings, self._bordered, self.policy is not Policy.NEVER_COMPOSE)
        return Search(reader, self.estimate, self.refuse, self.measured)

    def _bordered(self, inner: Expression, layer: Layer, source: fx.Node, node: fx.Node) -> Expression:
        """Return ``inner``, which ``source`` becomes, as what ``layer``, at ``node``, may read: as a map of ones, too,
        where the layer pads it with something else than what it is there. Raises NotAffine where that is not worth it.
        """
        if not border_takes_weights(inner, layer):
            return inner
        link = f"{self.recording.names[source]} -> {self.recording.names[node]}"
        try:
            self._check_border(inner, layer, link)
        except NotAffine:
            if not self._is_worth_ones(inner, layer, source, node):
                raise
            return homogeneous(inner)
        self._matching.add(link)  # for a search that tries one layer behind several maps, too
        return inner

    def _check_border(self, inner: Expression, layer: Layer, link: str) -> None:
        """Raise NotAffine where a layer pads ``inner`` with something else than what it is there: the one question that
        takes the weights, or what an earlier plan found.
        """
        if self.matching_borders is None:
            check_borders(inner, layer, self.tensors, device_of(self.recording.module))
        elif link not in self.matching_borders:
            raise NotAffine("shift-before-padding", "a layer that adds a constant, before one that pads with another")

    def _is_worth_ones(self, inner: Expression, layer: Layer, source: fx.Node, node: fx.Node) -> bool:
        """Whether to copy the source, with a channel of ones, is clearly less than a convolution that adds a constant.

        It never is where it takes the place of a normalisation, or where the layers are dear as one anyway.
        """
        if not isinstance(layer, Convolution) or not any(map(mixes, layers(inner))):
            return False
        try:
            whole = through(homogeneous(inner), layer)
        except NotAffine:
            return False
        (x,), shape_of, estimate = inputs_of(self.meanings[node]), self.recording.shape_of, self.estimate
        alone = through(Identity(layer.geometry.in_channels, layer.geometry.ndim), layer)
        apart = estimate.of_map(inner, source, shape_of[x]) + estimate.of_map(alone, x, shape_of[node])
        without = estimate.of_map(through(inner, layer), source, shape_of[node])
        after = estimate.of_map(whole, source, shape_of[node])
        return without.macs <= apart.macs and estimate.price(after) < (1 - TOLD_APART) * estimate.price(apart)

    def lay_out(self, candidates: list[Region]) -> Layout:
        """Decide where each of the candidates is written; the answer to the last question is kept."""
        if self._laid_out[0] != candidates:
            laying_out = LayingOut(self.meanings, self._worth_the_class, self._keeps_norm)
            self._laid_out = (candidates, laying_out.run(candidates))
        return self._laid_out[1]

    def _worth_the_class(self, candidates: list[Region]) -> bool:
        """Whether it gains enough to merge these that the network may lose its class, and its methods with it."""
        if self.keep_class is not None:
            return not self.keep_class
        if self.policy is Policy.ALWAYS:
            return True
        estimate = self.estimate
        before = estimate.of_nodes(node for region in candidates for node in region.working)
        after = total(estimate.of_groups(region.groups, region.root) for region in candidates)
        gained = estimate.price(before) - estimate.price(after)
        return gained >= WORTH_THE_CLASS * estimate.price(estimate.of_nodes(self.recording.nodes))

    def refuse(self, error: NotAffine, node: fx.Node, before: Cost | None = None, after: Cost | None = None) -> None:
        """Record, once, that ``node`` looked fusible and is not."""
        where = self.recording.where(node)
        self.refusals.setdefault((error.code, where), Refusal(error.code, where, error.reason, before, after))

    def _name_norms(self) -> None:
        """Refuse by its own name each normalisation that stays, if nothing was said of it."""
        recording, search = self.recording, self._searched
        merged = (node for fused in self.lay_out(self.candidates).fused for node in fused.group.nodes)
        said = {refusal.where: NotAffine(refusal.code, refusal.reason) for refusal in self.refusals.values()}
        known = {*map(recording.where, merged), *said}
        root_of = {node: region.root for region in self._regions for node in region.nodes}
        for norm in (node for node in recording.nodes if normalises(node, recording)):
            if recording.where(norm) not in known:
                sums = (reader for reader in search.readers.get(norm, ()) if isinstance(self.meanings.get(reader), Sum))
                places = map(recording.where, (root_of.get(norm, norm), *sums))
                of_region = next((said[where] for where in places if where in said), None)
                why = of_region or _why_not_before(norm, search) or _why_not_behind(norm, search) or _why_alone(norm)
                self.refuse(why, norm)

    def _keeps_norm(self, region: Region, group: Group) -> bool:
        """Whether a BatchNorm stays behind what the group becomes, which takes channels on the second axis.

        Behind depth to space it would have fewer.
        """
        axes = group.expression.geometry.ndim + 2
        merges = self.keep_affine and self._operations(group) > 1
        merges = merges and not any(term.picks for term in group.terms)
        return merges and len(self.estimate.shape_made(group, region.root)) == axes

    def _operations(self, group: Group) -> int:
        return sum(not self.estimate.passes(node) for node in group.nodes)

    def _is_site(self, region: Region, group: Group) -> bool:
        """Whether there is something to gain: several operations in one, or a weight that is computed each time."""
        if not group.convolves or not self.recording.constants.floating_leaves(group.expression.tensor_names):
            return False  # of numbers alone, nothing says in which dtype the result is to be stored
        least = 2
        if self.keep_affine and (group.span or len(region.groups) == 1):  # of a sum, all are written or none
            keeps = self._keeps_norm(region, group)
            meanings = (self.meanings[node] for node in group.nodes)
            if not keeps and any(isinstance(each, Scaled) and isinstance(each.by, Normalisation) for each in meanings):
                return False  # the norm would be gone: over tokens, no other can stay
            least = 3 if keeps else 2
        return self._operations(group) >= least or self.estimate.is_computed(group.expression)

    def _fits(self, region: Region, large: Collection[str] | None) -> bool:
        """Whether the fused weights fit into the dtype of those that they replace."""
        for group in region.written:
            dtype = overflows(group.expression, self.recording.constants, self.tensors, large)
            if dtype is not None:
                reason = f"a fused weight does not fit into {str(dtype).removeprefix('torch.')}"
                self.refuse(NotAffine("overflow", reason), region.root)
                return False
        return True

    def _holds(self, region: Region) -> bool:
        """Whether the region is a map of its sources at every time and at every size."""
        doubt = next(self._doubts(region), None)
        if doubt is not None:
            self.refuse(*doubt)
        return doubt is None

    def _doubts(self, region: Region) -> Iterator[tuple[NotAffine, fx.Node]]:
        """Yield where sources no longer hold at the root what the branches read, where a sum adds other shapes at other
        sizes, and where branches of one source have several there.
        """
        recording, order = self.recording, self.recording.order.__getitem__
        first = min((*region.nodes, *self._copies(region)), key=order)
        gone = region.nodes if len(region.written) == len(region.groups) else ()  # and what they write
        sources = (group.source for group in region.groups)
        if any(recording.memory.written_between(source, first, region.root, but=gone) for source in sources):
            yield NotAffine("in-place", "the source may be overwritten between its branches"), region.root
        for node in sorted(region.working, key=order):
            meaning = self.meanings[node]
            adds = isinstance(meaning, Sum) and set(inputs_of(meaning)) <= set(node.all_input_nodes)
            if adds and any(len(set(shapes)) > 1 for shapes in recording.operand_shapes(node)):
                yield NotAffine("broadcast", "at other sizes a sum of tensors of different shapes"), node
        merges = any(len(group.terms) > 1 for group in region.groups)
        if merges and not recording.foreign.keys().isdisjoint(region.working):
            yield NotAffine("changes-with-size", "its branches read other values at other sizes"), region.root

    def _copies(self, region: Region) -> Iterator[fx.Node]:
        """Yield the nodes outside of the region through which it reads its sources: a clone, or a stack, keeps what was
        there."""
        known = region.nodes | {group.source for group in region.groups}
        for node in region.nodes:
            yield from self._passages(node)
            for value in inputs_of(self.meanings[node]):
                copied = value
                while copied not in known:
                    yield copied
                    (copied,) = inputs_of(self.meanings[copied])

    def _passages(self, node: fx.Node) -> Iterator[fx.Node]:
        for value in node.all_input_nodes:
            if isinstance(self.meanings[value], Passage):
                yield value
                yield from self._passages(value)

    def _site(self, fused: Fused) -> Site:
        group, expression, recording, region = fused.group, fused.expression, self.recording, fused.region
        made = self.estimate.shape_made(group, region.root)
        after = self.estimate.of_map(expression, group.source, made)
        place = region.written.index(group)
        counted = frozenset[fx.Node]().union(*(earlier.nodes for earlier in region.written[:place]))
        if not place:  # what several have in common counts once
            after += self.estimate.of_joining(region.groups, region.root)
        if expression.has_ones and isinstance(expression.geometry, TransposedGeometry):
            after += Cost(launches=1)  # the copy: an operator, too, if a short one
        return Site(
            path=fused.path,
            owner=fused.owner,
            form=fused.form,
            branches=branches(expression),
            kernel=expression.geometry.describe() + (" + norm" if fused.norm else ""),
            source=recording.names[group.source],
            output=recording.names[region.root],
            nodes=tuple(recording.names[node] for node in sorted(group.nodes, key=recording.order.__getitem__)),
            before=self.estimate.of_nodes(group.nodes - counted),
            after=after + self.estimate.of_norm(group, region.root) if fused.norm else after,
        )


# Normalisations that stay: each is a refusal by its own name, with what stands in the way beside it.


def _why_not_before(norm: fx.Node, search: Search) -> NotAffine | None:
    """Return why the layer that makes what is normalised does not take the normalisation in, if there is one."""
    row, meanings = list(inputs_of(search.meanings.get(norm))), search.meanings
    while row and isinstance(meaning := meanings.get(row[-1]), Same):
        row.append(meaning.input)
    if not row or not any(term.convolves for term in search.terms.get(row[-1], ())):
        return None
    if any(len(search.readers[value]) > 1 or value in search.recording.escaping for value in row):
        return NotAffine("value-escapes", "what it normalises is also read elsewhere")
    return NotAffine("cost", "as one layer with what makes its input, it is predicted to gain nothing")


def _why_not_behind(norm: fx.Node, search: Search) -> NotAffine | None:
    """Return why the layer that reads the result does not take the normalisation in, if there is one."""
    row, meanings, readers = [norm], search.meanings, search.readers.get(norm, [])
    while len(readers) == 1 and isinstance(meanings.get(readers[0]), Same | Rearranged):
        row, readers = [*row, readers[0]], search.readers[readers[0]]
    layer = next((reader for reader in readers if convolves(meanings.get(reader))), None)
    if layer is None:
        return None
    mark = search.recording.between(row[-1], layer)
    if mark is not None:
        return NotAffine(*mark)
    if len(readers) > 1 or not search.recording.escaping.isdisjoint(row):
        return NotAffine("value-escapes", "its result is also read elsewhere")
    read = search.read((*row, layer))
    if isinstance(read, Failure):
        return read.error
    return NotAffine("cost", "as one layer with what reads it, it is predicted to gain nothing")


def _why_alone(norm: fx.Node) -> NotAffine:
    before = called(norm.all_input_nodes[0]) or "what the network is given"
    behind = " and ".join(dict.fromkeys(called(user) or "the output" for user in norm.users))
    return NotAffine("no-convolution", f"it stands between {before} and {behind}, and no layer is next to it")
