"""Each site against the part of the graph that it replaces."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import fx, nn

from repfuse.algebra.geometry import Geometry, Ints
from repfuse.networks import join
from repfuse.ops.meaning import Passage, Selected
from repfuse.placing.edits import Fused
from repfuse.planning.part_planner import PartPlanner
from repfuse.planning.region import Region
from repfuse.planning.replaying import replay
from repfuse.plans import Plan
from repfuse.proof.results import SiteProof
from repfuse.verifying import Trial, compare
from repfuse.verifying.comparison import answers_in_float64, outcomes_in_float64, tabulate
from repfuse.verifying.results import Comparison

TOLERANCE = 1e-12
"""Relative error that separates wrong algebra (1e-3) from float64 rounding (1e-15)."""


def prove_sites(original: nn.Module, fused: nn.Module, plan: Plan) -> Iterator[SiteProof]:
    """Compare, in float64, each site of ``fused`` with the nodes of the original's graph that it replaces.

    Both modules hold float64 weights. Yields a proof per sum, named after its first convolution.
    """
    for part in replay(original, plan):
        by_region: dict[fx.Node, list[Fused]] = {}
        for item in part.layout.fused:
            by_region.setdefault(item.region.root, []).append(item)
        for items in by_region.values():
            region = items[0].region
            path_of = {id(item.group): join(part.path, item.path) for item in items}
            before = _before(part.planner, part.module, region)
            after = _after(fused, region, path_of)
            yield SiteProof(path_of[id(items[0].group)], _compared(before, after, part.planner, region))


def _compared(before: nn.Module, after: nn.Module, planner: PartPlanner, region: Region) -> Comparison:
    """Compare on the trials that the original's operations take; at the example's size where they take none.

    Reflection needs more than the pixels it pads, an average pool over a volume more than its kernel.
    """
    trials = list(_trials(planner, region))
    expected = outcomes_in_float64(before, trials)
    if all(outcome.error for outcome in expected):
        return compare(before, after, [_at_the_example(planner, region)], TOLERANCE)
    return tabulate(trials, expected, answers_in_float64(after, trials, expected), TOLERANCE)


def _sources(region: Region) -> list[fx.Node]:
    return list(dict.fromkeys(group.source for group in region.groups))


def _before(planner: PartPlanner, original: nn.Module, region: Region) -> fx.GraphModule:
    """Return what computes the region's root from its sources as a module of them."""
    graph = fx.Graph()
    env = {source: graph.placeholder(source.name) for source in _sources(region)}
    needed = _needed(region.root, set(env), planner.origin)
    for node in (node for node in planner.traced.nodes if node in needed):
        env[node] = graph.node_copy(node, lambda used: env[used if used in env else planner.origin(used)])
    graph.output(env[region.root])
    return fx.GraphModule(original, graph)


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


def _after(fused: nn.Module, region: Region, path_of: Mapping[int, str]) -> fx.GraphModule:
    """Return the convolutions that replace the region, one per group with a path, as a module of the same sources."""
    root, graph = nn.Module(), fx.Graph()
    inputs = {source: graph.placeholder(source.name) for source in _sources(region)}
    total: fx.Node | None = None
    for number, group in enumerate(region.groups):
        value = inputs[group.source]
        if id(group) in path_of:
            root.add_module(f"part{number}", fused.get_submodule(path_of[id(group)]))
            value = graph.call_module(f"part{number}", (value,))
        elif group.of_source != 1:
            value = graph.call_function(operator.mul, (value, group.of_source))
        total = value if total is None else graph.call_function(operator.add, (total, value))
    graph.output(total)
    return fx.GraphModule(root, graph)


def _trials(planner: PartPlanner, region: Region) -> Iterator[Trial]:
    """Yield inputs from one pixel to just beyond the kernel's reach, even and odd, not all square, one nearly constant.

    Of a constant, kernels whose weights sum to 0 (standardised ones, a Laplacian) would leave nothing but rounding.
    """
    shape_of = planner.traced.shape_of
    sources = _sources(region)
    if len(sources) > 1 or _has_fixed_sizes(planner, region):  # their sizes depend on each other: the example's fit
        yield _at_the_example(planner, region)
    if len(sources) > 1:
        return
    for number, shape in enumerate(_shapes(shape_of[sources[0]], region.groups[0].expression.geometry)):
        label = f"input {'x'.join(map(str, shape))}"
        yield Trial(label, (_random(shape, number),))
        if number == 0:
            yield Trial(f"{label}, nearly constant", (1 + _random(shape, number) / 4,))


def _at_the_example(planner: PartPlanner, region: Region) -> Trial:
    shapes = [planner.traced.shape_of[source] for source in _sources(region)]
    return Trial("the example's size", tuple(_random(shape, seed) for seed, shape in enumerate(shapes)))


def _has_fixed_sizes(planner: PartPlanner, region: Region) -> bool:
    """Whether an operation of the region may hold sizes as numbers, so that no other size runs."""
    return any(isinstance(planner.meanings[node], Selected | Passage) for node in region.nodes)


def _shapes(example: Ints, geometry: Geometry) -> Iterator[Ints]:
    """Yield shapes of the source: of a linear layer with other leading axes, of a convolution with other sizes."""
    if not geometry.ndim:
        for number in range(4):
            yield (*(1 + (number + axis) % 3 for axis in range(len(example) - 1)), geometry.in_channels)
        return
    for number, size in enumerate(_sizes(geometry)):
        batch = (1 + number % 2,) if len(example) == geometry.ndim + 2 else ()
        yield (*batch, geometry.in_channels, *size)


def _sizes(geometry: Geometry) -> list[Ints]:
    """Return input sizes counted from the smallest that has an output."""
    least = geometry.smallest_input
    reach = max(taps[-1] - taps[0] + 1 for taps in geometry.taps)
    steps = [[1, 2], [0, 0], [2, 0], [reach, reach + 1]]
    return [tuple(low + step[axis % 2] for axis, low in enumerate(least)) for step in steps]


def _random(shape: Ints, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
