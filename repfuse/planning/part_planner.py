"""One traced part of a model: its regions, and what becomes of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cached_property

from torch import fx

from repfuse.algebra.descriptions import branches
from repfuse.algebra.expression import tensor_names
from repfuse.algebra.geometry import NotAffine
from repfuse.globs import ROOT
from repfuse.networks import join
from repfuse.ops import Meaning, meaning_of
from repfuse.ops.meaning import Applied, Combined, Passage, Rescaled, Same, Unfusible, convolves, inputs_of, origin
from repfuse.ops.scope import Scope
from repfuse.placing.edits import Candidate, Fused, Layout
from repfuse.placing.layout import lay_out
from repfuse.planning.borders import Borders
from repfuse.planning.bystanders import bystanders, find_ghosts
from repfuse.planning.cost import Policy
from repfuse.planning.estimate import Estimate
from repfuse.planning.hazards import Hazards
from repfuse.planning.reader import Reader
from repfuse.planning.region import Region
from repfuse.planning.regions import Regions
from repfuse.planning.storage import overflows
from repfuse.planning.terms import Group
from repfuse.plans import Cost, Refusal, Site
from repfuse.plans import Part as PlannedPart
from repfuse.tracing.parts import Part


class PartPlanner:
    """Plans one traced part of a model, by ``policy``.

    ``matching_borders`` are the layers that another plan found to pad with what lies beyond the border; without it, the
    weights are asked.
    """

    def __init__(
        self, part: Part, policy: Policy = Policy.COST, matching_borders: Collection[str] | None = None
    ) -> None:
        self.part = part
        self.traced = traced = part.traced
        self.policy = policy
        self.replays = matching_borders is not None
        ghosts = find_ghosts(traced)
        self.scope = Scope(traced.module, traced.constants, traced.shape_of)
        self.refusals: dict[tuple[str, str], Refusal] = {}
        self.meanings = {node: None if node in ghosts else self._meaning(node) for node in traced.nodes}
        self.hazards = Hazards(traced, self.meanings)
        self._laid_out: tuple[list[Candidate], Layout] = ([], Layout())
        for node in traced.nodes:
            self._drop_unusable(node)
        self.bystanders = bystanders(traced, self.meanings, ghosts)
        self.estimate = Estimate(traced, self.meanings, policy)
        self.borders = Borders(traced.constants, matching_borders)

    def planned(self) -> PlannedPart:
        """Return what a plan keeps of this part besides its sites and refusals, once these are found."""
        borders, shared = tuple(sorted(self.borders.matching)), tuple(sorted(self.part.shared))
        part = self.part
        return PlannedPart(part.path, self.traced.fingerprint(), part.arguments, borders, shared, part.exported)

    def sites(self, layout: Layout | None = None) -> tuple[Site, ...]:
        """Return every convolution that is to be written: those of ``layout``, else all that there can be."""
        return tuple(map(self._site, (layout or self.lay_out(self.candidates)).fused))

    @cached_property
    def candidates(self) -> list[Candidate]:
        """Return every region with the groups of it that are worth one convolution each."""
        composes = self.policy is not Policy.NEVER_COMPOSE
        reader = Reader(self.meanings, self.traced.shape_of, self.borders.check, composes)
        search = Regions(self.bystanders, reader, self.estimate, self.refuse)
        regions = search.find()
        for node in search.escaping():
            self.refuse(NotAffine("value-escapes", "its result is also read elsewhere"), node)
        found = [Candidate(region, tuple(filter(self._is_site, region.groups))) for region in regions]
        there = [candidate for candidate in found if candidate.groups and self._still_there(candidate.region)]
        return there if self.replays else list(filter(self._fits, there))

    def lay_out(self, candidates: list[Candidate]) -> Layout:
        """Decide where each of the candidates is written; the answer to the last question is kept."""
        if self._laid_out[0] != candidates:
            layout = lay_out(self.traced, candidates, self.meanings, self.bystanders, self.refuse)
            self._laid_out = (candidates, layout)
        return self._laid_out[1]

    def origin(self, node: fx.Node) -> fx.Node:
        """Return the node whose value ``node`` passes on unchanged."""
        return origin(node, self.meanings)

    def refuse(self, error: NotAffine, node: fx.Node, before: Cost | None = None, after: Cost | None = None) -> None:
        """Record, once, that ``node`` looked fusible and is not."""
        where = self.where(node)
        self.refusals.setdefault((error.code, where), Refusal(error.code, where, error.reason, before, after))

    def where(self, node: fx.Node) -> str:
        """Return where a node stands, for people: a module path, or the module whose forward it is in."""
        if node.op == "call_module":
            return join(self.part.path, str(node.target))
        return f"{join(self.part.path, self.traced.call_of[node].path) or ROOT}: {node.name}"

    def _meaning(self, node: fx.Node) -> Meaning | None:
        if node.op == "call_module" and node.target in self.traced.opaque:
            return None
        meaning = meaning_of(node, self.scope)
        if not isinstance(meaning, Applied | Rescaled) or not self._is_shared(node):
            return meaning
        if convolves(meaning):
            self.refuse(NotAffine("called-differently", "it is also used where the model cannot be traced"), node)
        return None

    def _is_shared(self, node: fx.Node) -> bool:
        """Whether the module of a node, or one around it, is used by others than this graph."""
        paths = {call.path for call in self.traced.call_of[node].chain()}
        if node.op == "call_module":
            paths.add(str(node.target))
        return not self.part.shared.isdisjoint(paths)

    def _drop_unusable(self, node: fx.Node) -> None:
        """Make a node opaque that only looks like an affine map."""
        meaning = self.meanings[node]
        tensors = (node, *inputs_of(meaning))
        if isinstance(meaning, Unfusible):
            self._reject(node, meaning.code, meaning.reason)
        elif isinstance(meaning, Passage) or meaning is None:
            return
        elif not self.traced.shape_of.keys() >= set(tensors):
            self.meanings[node] = None  # numbers and sizes, not tensors
        elif len({self.traced.dtype_of[x] for x in tensors}) > 1:
            self.meanings[node] = None  # a conversion: uint8 * 1.0 is float
        elif isinstance(meaning, Combined) and len({self.traced.shape_of[x] for x in tensors}) > 1:
            self._reject(node, "broadcast", "a sum of tensors of different shapes")
        elif isinstance(meaning, Combined | Rescaled) and meaning.in_place and self.hazards.seen_later(node):
            self._reject(node, "in-place", "what is overwritten here is read again later")

    def _reject(self, node: fx.Node, code: str, reason: str) -> None:
        if self._has_affine_neighbour(node, also=() if code == "broadcast" else (Combined,)):
            self.refuse(NotAffine(code, reason), node)
        self.meanings[node] = None

    def _has_affine_neighbour(self, node: fx.Node, also: tuple[type[Meaning], ...]) -> bool:
        """Whether a layer or a normalisation (or one of ``also``) is next to the node, or reads what it reads."""
        beside = (operand for user in node.users for operand in user.all_input_nodes if operand is not node)
        near = (*node.all_input_nodes, *node.users, *beside)
        return any(isinstance(self.meanings.get(other), (Applied, Rescaled, *also)) for other in near)

    def _is_site(self, group: Group) -> bool:
        """Whether there is something to gain: several operations in one, or a weight that is computed each time."""
        if not group.convolves or not self.traced.constants.floating_leaves(tensor_names(group.expression)):
            return False  # of numbers alone, nothing says in which dtype the result is to be stored
        several = sum(not isinstance(self.meanings[node], Same) for node in group.nodes) > 1
        return several or self.estimate.is_computed(group.expression)

    def _fits(self, candidate: Candidate) -> bool:
        """Whether the fused weights fit into the dtype of those that they replace."""
        for group in candidate.groups:
            dtype = overflows(group.expression, self.traced.constants)
            if dtype is not None:
                reason = f"a fused weight does not fit into {str(dtype).removeprefix('torch.')}"
                self.refuse(NotAffine("overflow", reason), candidate.region.root)
                return False
        return True

    def _still_there(self, region: Region) -> bool:
        """Whether the sources hold at the root what they held when the branches read them."""
        first = min((*region.nodes, *self._copies(region)), key=self.traced.order.__getitem__)
        for group in region.groups:
            if self.hazards.written_between(group.source, first, region.root):
                reason = "the source may be overwritten between its branches"
                self.refuse(NotAffine("in-place", reason), region.root)
                return False
        return True

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
        group, expression = fused.group, fused.expression
        return Site(
            path=join(self.part.path, fused.path),
            owner=join(self.part.path, fused.owner),
            form=fused.form,
            branches=branches(expression),
            kernel=expression.geometry.describe(),
            source=group.source.name,
            output=fused.region.root.name,
            nodes=tuple(node.name for node in sorted(group.nodes, key=self.traced.order.__getitem__)),
            before=self.estimate.of_nodes(group.nodes),
            after=self.estimate.of_map(expression, group.source, self.traced.shape_of[fused.region.root]),
            part=self.part.path,
        )
