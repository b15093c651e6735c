"""Each region by itself, before and after the rewrite, as modules of its sources.

Neither knows the algebra: before are the original's own operations, after the fused modules as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx, nn

from repfuse.placing.edits import Fused
from repfuse.planning.planner import Planner
from repfuse.planning.region import Region
from repfuse.planning.replaying import replay
from repfuse.plans import Plan


@dataclass(frozen=True)
class Place:
    """One region of the network ``module``; ``path_of`` are the paths of the convolutions that its groups became.

    Groups without one stay what they are, a factor of their source. Named after its first convolution.
    """

    planner: Planner
    module: nn.Module
    region: Region
    path_of: Mapping[int, str]

    @property
    def path(self) -> str:
        """Where its first convolution is after the rewrite."""
        return next(iter(self.path_of.values()))

    @property
    def sources(self) -> list[fx.Node]:
        """The nodes that it takes its inputs from, each once."""
        return list(dict.fromkeys(group.source for group in self.region.groups))

    def before(self) -> fx.GraphModule:
        """Return what computes the region's root from its sources, over the tensors of ``module``."""
        graph = fx.Graph()
        env = {source: graph.placeholder(source.name) for source in self.sources}
        needed = _needed(self.region.root, set(env), self.planner.origin)
        for node in (node for node in self.planner.recording.nodes if node in needed):
            env[node] = graph.node_copy(node, lambda used: env[used if used in env else self.planner.origin(used)])
        graph.output(env[self.region.root])
        return fx.GraphModule(self.module, graph)

    def after(self, fused: nn.Module, factor: Callable[[float], float] = lambda by: by) -> fx.GraphModule:
        """Return the convolutions of the network ``fused`` that replace the region, over its tensors.

        A source that is only added up, times a number, is multiplied by ``factor`` of it.
        """
        root, graph = nn.Module(), fx.Graph()
        inputs = {source: graph.placeholder(source.name) for source in self.sources}
        total: fx.Node | None = None
        for number, group in enumerate(self.region.groups):
            value = inputs[group.source]
            if id(group) in self.path_of:
                root.add_module(f"part{number}", fused.get_submodule(self.path_of[id(group)]))
                value = graph.call_module(f"part{number}", (value,))
            elif group.of_source is not None and factor(group.of_source) != 1:
                value = graph.call_function(operator.mul, (value, factor(group.of_source)))
            total = value if total is None else graph.call_function(operator.add, (total, value))
        graph.output(total)
        return fx.GraphModule(root, graph)


def places(original: nn.Module, plan: Plan) -> Iterator[Place]:
    """Yield the regions that ``plan`` replaces in ``original``, in the order in which they run."""
    replayed = replay(original, plan)
    order = replayed.planner.recording.order
    found: dict[fx.Node, list[Fused]] = {}
    for item in replayed.layout.fused:
        found.setdefault(item.region.root, []).append(item)
    for _, items in sorted(found.items(), key=lambda entry: order[entry[0]]):
        yield Place(replayed.planner, original, items[0].region, {id(item.group): item.path for item in items})


def _needed(root: fx.Node, sources: set[fx.Node], origin: Callable[[fx.Node], fx.Node]) -> set[fx.Node]:
    """Return the nodes between the sources and ``root``, what they take their weights and sizes from included."""
    needed: set[fx.Node] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node not in needed and origin(node) not in sources:
            needed.add(node)
            waiting += node.all_input_nodes
    return needed
