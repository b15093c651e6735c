"""Each site against the part of the graph that it replaces."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import fx, nn

from repfuse.algebra.geometry import Ints
from repfuse.placing.edits import Fused
from repfuse.planning.planner import Planner
from repfuse.planning.regions import Region
from repfuse.plans import Plan
from repfuse.proof.results import SiteProof
from repfuse.rewriting import lay_out_plan
from repfuse.verifying import Trial, compare

TOLERANCE = 1e-12
"""Relative error that separates wrong algebra (1e-3) from float64 rounding (1e-15)."""


def prove_sites(original: nn.Module, fused: nn.Module, plan: Plan) -> Iterator[SiteProof]:
    """Compare, in float64, each site of ``fused`` with the nodes of the original's graph that it replaces.

    Both modules hold float64 weights. Yields a proof per sum, named after its first convolution.
    """
    planner, layout = lay_out_plan(original, plan)
    by_region: dict[fx.Node, list[Fused]] = {}
    for item in layout.fused:
        by_region.setdefault(item.region.root, []).append(item)
    for items in by_region.values():
        region = items[0].region
        before = _before(planner, original, region)
        after = _after(fused, region, items)
        yield SiteProof(items[0].path, compare(before, after, list(_trials(planner, region)), TOLERANCE))


def _sources(region: Region) -> list[fx.Node]:
    return list(dict.fromkeys(group.source for group in region.groups))


def _before(planner: Planner, original: nn.Module, region: Region) -> fx.GraphModule:
    """Return the nodes of the region as a module of its sources."""
    graph = fx.Graph()
    env = {source: graph.placeholder(source.name) for source in _sources(region)}
    for node in planner.traced.nodes:
        if node in region.nodes or (node.op == "get_attr" and region.nodes.intersection(node.users)):
            env[node] = graph.node_copy(node, lambda used: env[planner.origin(used) if used not in env else used])
    graph.output(env[region.root])
    return fx.GraphModule(original, graph)


def _after(fused: nn.Module, region: Region, items: Sequence[Fused]) -> fx.GraphModule:
    """Return the convolutions that replace the region as a module of the same sources."""
    path_of = {id(item.group): item.path for item in items}
    root, graph = nn.Module(), fx.Graph()
    inputs = {source: graph.placeholder(source.name) for source in _sources(region)}
    total: fx.Node | None = None
    for number, group in enumerate(region.groups):
        value = inputs[group.source]
        if id(group) in path_of:
            root.add_module(f"part{number}", fused.get_submodule(path_of[id(group)]))
            value = graph.call_module(f"part{number}", (value,))
        total = value if total is None else graph.call_function(operator.add, (total, value))
    graph.output(total)
    return fx.GraphModule(root, graph)


def _trials(planner: Planner, region: Region) -> Iterator[Trial]:
    """Yield inputs from one pixel to just beyond the kernel's reach, even and odd, not all square, one constant."""
    shape_of = planner.traced.shape_of
    sources = _sources(region)
    if len(sources) > 1:  # their sizes depend on each other: the example's fit
        shapes = [shape_of[source] for source in sources]
        yield Trial("the example's size", tuple(_random(shape, seed) for seed, shape in enumerate(shapes)))
        return
    channels = shape_of[sources[0]][1]
    for number, size in enumerate(_sizes(region)):
        shape = (1 + number % 2, channels, *size)
        label = f"batch {shape[0]}, size {'x'.join(map(str, size))}"
        yield Trial(label, (_random(shape, number),))
        if number == 0:
            yield Trial(f"{label}, constant", (torch.ones(shape, dtype=torch.float64),))


def _sizes(region: Region) -> list[Ints]:
    """Return input sizes counted from the smallest that has an output."""
    geometry = region.groups[0].expression.geometry
    least = [max(1, -slack) for slack in geometry.slack]
    reach = [taps[-1] - taps[0] + 1 for taps in geometry.taps]
    steps = [[1, 2], [0, 0], [2, 0], [max(reach), max(reach) + 1]]
    return [tuple(low + step[axis % 2] for axis, low in enumerate(least)) for step in steps]


def _random(shape: Ints, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
