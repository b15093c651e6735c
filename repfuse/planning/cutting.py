"""Where to cut a region that is exact as a whole: between which layers in a row, so that the parts are least work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from torch import fx

from repfuse.algebra.geometry import NotAffine
from repfuse.ops.meaning import Applied, Selected, Stacked, inputs_of, origin
from repfuse.planning.estimate import Estimate
from repfuse.planning.reader import Reader
from repfuse.planning.region import Region, region_of
from repfuse.planning.terms import Term
from repfuse.plans import Cost

Terms = tuple[Term, ...]


@dataclass(frozen=True)
class Cut:
    """Ending a region at ``node``, which ``reader`` reads, and what the two parts then cost."""

    node: fx.Node
    reader: fx.Node
    cost: Cost


class Cutting:
    """Tries cuts. ``reach`` gives the terms of an operand of a node, as the whole region has them."""

    def __init__(self, reader: Reader, estimate: Estimate, reach: Callable[[fx.Node, fx.Node], Terms]) -> None:
        self.reader = reader
        self.estimate = estimate
        self.meanings = estimate.meanings
        self.order = estimate.recording.order
        self.reach = reach

    def best(self, region: Region, terms: Mapping[fx.Node, Terms]) -> Cut | None:
        """Return the one cut that leaves the least work; None where the region has no layers in a row."""
        cuts = []
        for reader in sorted(region.working, key=self.order.__getitem__):  # in order: of equal cuts always the first
            if isinstance(meaning := self.meanings[reader], Applied | Selected | Stacked):
                inner = dict.fromkeys(origin(x, self.meanings) for x in inputs_of(meaning))
                for node in (node for node in inner if node in region.working):
                    with suppress(NotAffine):  # what is left needs more cuts
                        cuts.append(Cut(node, reader, self._cost(region, node, terms[node])))
        return min(cuts, key=lambda cut: self.estimate.price(cut.cost), default=None)

    def _cost(self, region: Region, cut: fx.Node, of_cut: Terms) -> Cost:
        """Return the cost of the region and of its node ``cut``, each for itself."""
        terms: dict[fx.Node, Terms] = {cut: (self.reader.source(cut),)}
        for node in sorted(region.nodes, key=self.order.__getitem__):
            inputs = inputs_of(self.meanings[node])
            if node is not cut and any(x in terms for x in inputs):
                known = {x: terms.get(x) or self.reach(x, node) for x in inputs}
                terms[node] = self.reader.terms(node, known.__getitem__)
        return self._least(cut, of_cut) + self._least(region.root, terms[region.root])

    def _least(self, root: fx.Node, terms: Terms) -> Cost:
        """Return the cost of these terms as they are, or as groups, whichever is less."""
        region = region_of(root, terms, self.estimate, _ignore)
        costs = [self.estimate.of_nodes(region.working)]
        if region.is_writable:
            costs.append(self.estimate.of_groups(region.groups, region.root))
        return min(costs, key=self.estimate.price)


def _ignore(_error: NotAffine, _node: fx.Node, _before: Cost | None, _after: Cost | None) -> None:
    """Refuse nothing: the question was hypothetical."""
