"""The cost of what is there, and of what would replace it, at the shapes of the example."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from repfuse.algebra.expression import Expression, Joined, Scaled, Selected, Sum, Through, tensor_names
from repfuse.algebra.layers import Convolution
from repfuse.ops.meaning import Meaning, Rearranged, Same, before_phases
from repfuse.ops.spelling import spelled
from repfuse.ops.sums import ARITHMETIC
from repfuse.planning.cost import convolution_cost, elementwise_cost, filter_cost, is_better, price
from repfuse.planning.terms import Group
from repfuse.plans import Cost, Policy
from repfuse.recording.constants import Constants
from repfuse.recording.recording import Recording


class Estimate:
    """Estimates for one recorded network."""

    def __init__(self, recording: Recording, meanings: dict[fx.Node, Meaning | None], policy: Policy) -> None:
        self.recording = recording
        self.meanings = meanings
        self.policy = policy

    def price(self, cost: Cost) -> float:
        """Return what the policy compares."""
        return price(cost, self.policy)

    def is_better(self, after: Cost, before: Cost) -> bool:
        """Whether the policy prefers ``after`` by enough to replace ``before`` by it."""
        return is_better(after, before, self.policy)

    def of_nodes(self, nodes: Iterable[fx.Node]) -> Cost:
        """Cost of the nodes as they are, computed weights included."""
        return sum((self._node(node) for node in nodes), Cost())

    def of_map(self, expression: Expression, source: fx.Node, output: Sequence[int]) -> Cost:
        """Cost of an expression as one convolution from the value of ``source`` to a map of shape ``output``."""
        geometry = expression.geometry.plainest
        shape = (*output[:1], geometry.out_channels, *output[2:]) if geometry.ndim else output
        return convolution_cost(geometry, tuple(shape), self.recording.shape_of[source], self._item(source))

    def of_groups(self, groups: Sequence[Group], root: fx.Node) -> Cost:
        """Cost of the sum of ``groups``, one convolution each."""
        shape, item = self.recording.shape_of[root], self._item(root)
        parts = [self.of_map(g.expression, g.source, self.shape_made(g, root)) for g in groups if g.of_source is None]
        factors = [elementwise_cost(shape, 1, item) for g in groups if g.of_source not in (None, 1, -1)]
        sums = [elementwise_cost(shape, 2, item)] * (len(groups) - 1)
        return sum((*parts, *factors, *sums), Cost())

    def of_norm(self, group: Group, root: fx.Node) -> Cost:
        """Cost of a BatchNorm behind the convolution that a group becomes."""
        shape = self.shape_made(group, root)
        return elementwise_cost(shape, 1, self._item(root), parameters=4 * shape[1])

    def shape_made(self, group: Group, root: fx.Node) -> tuple[int, ...]:
        """Return the shape of what the convolution makes, which may be put elsewhere before it gets to ``root``."""
        nodes = before_phases(group.nodes, self.meanings, self.recording.order) or [root]
        layered = [node for node in nodes if isinstance(self.meanings[node], Through)]
        return self.recording.shape_of[(layered or nodes)[-1]]

    def _node(self, node: fx.Node) -> Cost:  # noqa: PLR0911
        if node not in self.recording.shape_of or node.op in ("placeholder", "get_attr"):
            return Cost()
        shape, item = self.recording.shape_of[node], self._item(node)
        match self.meanings[node]:
            case Through(x, Convolution(geometry, weight, bias)):
                own = convolution_cost(geometry, shape, self.recording.shape_of[x], item)
                return own + self._computed([weight] if bias is None else [weight, bias], item)
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
        call = spelled(node) if isinstance(self.meanings[node], Same) else None
        return call is not None and call.operator in ARITHMETIC

    def computing(self, node: fx.Node) -> fx.Node:
        """Return the node that computes the value of ``node``, be it in vain."""
        while isinstance(meaning := self.meanings.get(node), Same) and not self.is_wasted(node):
            node = meaning.input
        return node

    def _computed(self, names: Iterable[str], item: int) -> Cost:
        constants: Constants = self.recording.constants
        computed = filter(constants.is_computed, names)
        return sum((elementwise_cost(constants.shape(name), 1, item) for name in computed), Cost())

    def _item(self, node: fx.Node) -> int:
        return self.recording.dtype_of[node].itemsize

    def is_computed(self, expression: Expression) -> bool:
        """Whether a tensor of the expression is computed in every forward."""
        return any(map(self.recording.constants.is_computed, tensor_names(expression)))
