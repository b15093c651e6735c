"""One region: nodes that are together a sum of affine maps of their sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from torch import fx

from repfuse.ops.meaning import Same
from repfuse.planning.estimate import Estimate
from repfuse.planning.grouping import Refuse, grouped
from repfuse.planning.terms import Group, Nodes, Term


@dataclass(frozen=True, eq=False)
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

    @property
    def is_writable(self) -> bool:
        """Whether each group is a convolution, or a number times its source."""
        return all(group.of_source is not None or group.convolves for group in self.groups)


def region_of(root: fx.Node, terms: Sequence[Term], estimate: Estimate, refuse: Refuse) -> Region:
    """Return the region of these terms, without the no-ops at its end: they stay, after the one convolution."""
    groups = grouped(terms, root, estimate, refuse)
    nodes = frozenset(chain.from_iterable(group.nodes for group in groups))
    while isinstance(meaning := estimate.meanings[root], Same) and meaning.input in nodes:
        nodes -= {root}
        root = meaning.input
    passing = frozenset(node for node in nodes if isinstance(estimate.meanings[node], Same))
    return Region(root, groups, nodes - passing, passing)
