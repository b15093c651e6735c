"""module -> plan: which regions become one convolution each, which do not, and why."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from repfuse.algebra.expression import branches
from repfuse.algebra.geometry import NotAffine
from repfuse.ops import Meaning, meaning_of
from repfuse.ops.meaning import Combined, Convolved, Normed, Same, Unfusible, inputs_of, origin
from repfuse.placing.edits import Candidate, Fused, Layout
from repfuse.placing.layout import lay_out
from repfuse.planning.cost import cheaper, convolution_cost, elementwise_cost
from repfuse.planning.hazards import Hazards
from repfuse.planning.regions import Group, Region, Regions
from repfuse.plans import Cost, Plan, Refusal, Site
from repfuse.tracing.trace import Traced, trace


def plan(module: nn.Module, example_inputs: Sequence[Tensor]) -> Plan:
    """Find what repfuse would rewrite in ``module``, without changing it.

    ``example_inputs`` are the positional arguments of one call; their shapes decide the costs. Raises RepfuseError
    where the model cannot be traced or does not take the example.
    """
    inputs = tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in example_inputs)
    return Planner(trace(module, example_inputs)).plan(inputs)


class Planner:
    """Plans one traced model."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.ghosts = find_ghosts(traced)
        self.meanings: dict[fx.Node, Meaning | None] = {node: self._meaning(node) for node in traced.nodes}
        self.hazards = Hazards(traced, self.meanings)
        self.refusals: dict[tuple[str, str], Refusal] = {}
        self._laid_out: tuple[list[Candidate], Layout] = ([], Layout())
        for path, why in traced.opaque.items():
            self.refusals["untraceable", path] = Refusal("untraceable", path, why)
        for node in traced.nodes:
            self._drop_unusable(node)

    def plan(self, inputs: tuple[tuple[tuple[int, ...], str], ...]) -> Plan:
        """Return the sites and refusals, for an example of these shapes and dtypes."""
        candidates = self.candidates()
        layout = self.lay_out(candidates)
        sites = tuple(self._site(fused) for fused in layout.fused)
        return Plan(sites, tuple(self.refusals.values()), self.traced.fingerprint(), inputs, (self, candidates))

    def candidates(self) -> list[Candidate]:
        """Return every region with the groups of it that are worth one convolution each."""
        search = Regions(self.traced, self.meanings, self.ghosts, self._accept, self.refuse)
        regions = search.find()
        for node in search.escaping():
            self.refuse(NotAffine("value-escapes", "its result is also read elsewhere"), node)
        found = [Candidate(region, tuple(filter(self._is_site, region.groups))) for region in regions]
        return [candidate for candidate in found if candidate.groups and self._still_there(candidate.region)]

    def lay_out(self, candidates: list[Candidate]) -> Layout:
        """Decide where each of the candidates is written; the answer to the last question is kept."""
        if self._laid_out[0] != candidates:
            layout = lay_out(self.traced, candidates, self.meanings, self.ghosts, self.refuse)
            self._laid_out = (candidates, layout)
        return self._laid_out[1]

    def origin(self, node: fx.Node) -> fx.Node:
        """Return the node whose value ``node`` passes on unchanged."""
        return origin(node, self.meanings)

    def refuse(self, error: NotAffine, node: fx.Node, before: Cost | None = None, after: Cost | None = None) -> None:
        """Record, once, that ``node`` looked fusible and is not."""
        where = self._where(node)
        self.refusals.setdefault((error.code, where), Refusal(error.code, where, error.reason, before, after))

    def _where(self, node: fx.Node) -> str:
        """Return where a node stands, for people: a module path, or the module whose forward it is in."""
        if node.op == "call_module":
            return str(node.target)
        return f"{self.traced.call_of[node].path or '(root)'}: {node.name}"

    def _meaning(self, node: fx.Node) -> Meaning | None:
        unknown = node in self.ghosts or (node.op == "call_module" and node.target in self.traced.opaque)
        return None if unknown else meaning_of(node, self.traced.module)

    def _drop_unusable(self, node: fx.Node) -> None:
        """Make a node opaque that only looks like an affine map."""
        meaning = self.meanings[node]
        if isinstance(meaning, Unfusible):
            self._reject(node, meaning.code, meaning.reason)
        elif not self.traced.shape_of.keys() >= {node, *inputs_of(meaning)}:
            self.meanings[node] = None  # numbers and sizes, not tensors
        elif (
            isinstance(meaning, Combined | Same)
            and len({self.traced.dtype_of[x] for x in (node, *inputs_of(meaning))}) > 1
        ):
            self.meanings[node] = None  # a conversion: uint8 * 1.0 is float
        elif isinstance(meaning, Combined) and len(meaning.terms) > 1:
            if len({self.traced.shape_of[each] for each in (node, *inputs_of(meaning))}) > 1:
                self._reject(node, "broadcast", "a sum of tensors of different shapes")
            elif meaning.in_place and self.hazards.seen_later(node):
                self._reject(node, "in-place", "what is overwritten here is read again later")

    def _reject(self, node: fx.Node, code: str, reason: str) -> None:
        if self._has_affine_neighbour(node):
            self.refuse(NotAffine(code, reason), node)
        self.meanings[node] = None

    def _has_affine_neighbour(self, node: fx.Node) -> bool:
        beside = (operand for user in node.users for operand in user.all_input_nodes if operand is not node)
        near = (*node.all_input_nodes, *node.users, *beside)
        return any(isinstance(self.meanings.get(other), Convolved | Normed) for other in near)

    def _accept(self, region: Region, group: Group) -> bool:
        """The law of cost, for a group of more than one operation."""
        working = self._working(group)
        if len(working) < 2:
            return True
        if not group.convolves:
            self.refuse(
                NotAffine("no-convolution", "a sum of skips and normalisations without a convolution"), region.root
            )
            return len(region.groups) == 1
        before, after = self._before(group), self._after(group)
        if cheaper(after, before):
            return True
        self.refuse(NotAffine("cost", "one convolution is predicted to be slower here"), region.root, before, after)
        return False

    def _is_site(self, group: Group) -> bool:
        worth = len(self._working(group)) > 1 and group.convolves
        return worth and cheaper(self._after(group), self._before(group))

    def _working(self, group: Group) -> list[fx.Node]:
        return [node for node in group.nodes if not isinstance(self.meanings[node], Same)]

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
        """Yield the nodes outside of the region through which it reads its sources: a clone keeps what was there."""
        known = region.nodes | {group.source for group in region.groups}
        for node in region.nodes:
            for value in inputs_of(self.meanings[node]):
                copied = value
                while copied not in known:
                    yield copied
                    (copied,) = inputs_of(self.meanings[copied])

    def _site(self, fused: Fused) -> Site:
        group, expression = fused.group, fused.expression
        return Site(
            path=fused.path,
            owner=fused.owner,
            form=fused.form,
            branches=branches(expression),
            kernel=expression.geometry.describe(),
            source=group.source.name,
            output=fused.region.root.name,
            nodes=tuple(node.name for node in sorted(group.nodes, key=self.traced.order.__getitem__)),
            before=self._before(group),
            after=self._after(group),
        )

    def _before(self, group: Group) -> Cost:
        return sum((self._node_cost(node) for node in group.nodes), Cost())

    def _after(self, group: Group) -> Cost:
        root = max(group.nodes, key=self.traced.order.__getitem__)
        shape_of = self.traced.shape_of
        return convolution_cost(group.expression.geometry, shape_of[root], shape_of[group.source], self._item(root))

    def _node_cost(self, node: fx.Node) -> Cost:
        shape, item = self.traced.shape_of[node], self._item(node)
        match self.meanings[node]:
            case Convolved(x, convolution):
                return convolution_cost(convolution.geometry, shape, self.traced.shape_of[x], item)
            case Normed():
                return elementwise_cost(shape, 1, item, parameters=4 * shape[1])
            case Combined(operands):
                return elementwise_cost(shape, len(operands), item)
            case _:
                return Cost()

    def _item(self, node: fx.Node) -> int:
        return self.traced.dtype_of[node].itemsize


_METADATA = frozenset(
    {getattr, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.getitem}
)


def find_ghosts(traced: Traced) -> set[fx.Node]:
    """Return the nodes that only check metadata: assertions, what nothing else needs, parameters read in vain.

    They read no values, and what they assert of a tensor's rank holds for the fused one too.
    """
    ghosts: set[fx.Node] = set()
    for node in reversed(traced.nodes):
        if node.target is torch._assert:
            ghosts.add(node)
        elif not ghosts.issuperset(node.users):
            continue
        elif node.op == "get_attr":
            ghosts.add(node)
        elif node in traced.shape_of:
            continue
        elif node.target in _METADATA or (node.op == "call_method" and node.target in ("size", "dim")):
            ghosts.add(node)
    return ghosts
