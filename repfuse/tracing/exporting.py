"""Blocks that symbolic tracing cannot follow, as torch.export reads them: shape arithmetic, loops over sizes.

An exported graph holds for the sizes that it was made for. Only one that holds for all of them will do: of every input
each axis but the channels is a symbol of its own, without a guard, and the graph gives what the block gives at sizes
down to one pixel, which torch.export takes for larger.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils._sympy.numbers import int_oo

from repfuse.quiet import quietly
from repfuse.tracing.arguments import Arguments
from repfuse.tracing.skeleton import copy_with

CHANNELS = 1
LARGEST = 16
"""Convolutions in a block: what is larger is a network, and keeps its class."""


def is_block(module: nn.Module) -> bool:
    """Whether a module is small enough to be one block, and has convolutions."""
    return 0 < sum(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules()) <= LARGEST


def export(module: nn.Module, arguments: Arguments) -> fx.GraphModule | None:
    """Return ``module`` as one graph over its own tensors; None where torch.export cannot, or not for all sizes."""
    given = Arguments(*tree_map(_in_a_batch, (arguments.args, dict(arguments.kwargs))))
    try:
        with quietly(), torch.no_grad():
            sizes = tree_map(_axes, (given.args, given.kwargs))
            # By position, as the arguments are: torch.export would want the parameters' names.
            shapes = sizes[0] + tuple(sizes[1].values())
            program = torch.export.export(module, given.args, dict(given.kwargs), dynamic_shapes=shapes)
            if not _holds_for_all_sizes(program):
                return None
            graph_module = _without_guards(program.module())
            return graph_module if _agree(module, graph_module, given) else None
    except Exception:  # torch.export can fail in any way, and then the block stays as it is
        return None


def _in_a_batch(value: Any) -> Any:
    """Repeat a batch of one: torch.export takes sizes of 1 for fixed."""
    one = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == 1
    return value.repeat(2, *[1] * (value.dim() - 1)) if one else value


def _axes(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return None
    return {axis: torch.export.Dim.AUTO for axis in range(value.dim()) if axis != CHANNELS}


def _holds_for_all_sizes(program: Any) -> bool:
    limits = program.range_constraints.values()
    if program._guards_code or any(limit.lower > 2 or limit.upper != int_oo for limit in limits):
        return False
    nodes = (node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    shapes = [node.meta["val"].shape for node in nodes if isinstance(node.meta["val"], Tensor)]
    free = [[str(size) for axis, size in enumerate(shape) if axis != CHANNELS] for shape in shapes]
    return all(len(set(sizes)) == len(sizes) and not any(size.isdigit() for size in sizes) for sizes in free)


def _without_guards(made: fx.GraphModule) -> fx.GraphModule:
    for node in made.graph.find_nodes(op="call_module", target="_guards_fn"):
        made.graph.erase_node(node)
        made.delete_submodule("_guards_fn")
    made.recompile()
    for part in made.modules():  # an exported program has no eval()
        part.training = False
    return made


def _agree(module: nn.Module, made: nn.Module, given: Arguments) -> bool:
    """Whether both compute the same at other sizes; where the block fails, so may the graph."""
    return all(_same(copy_with(module, {}), made, each) for each in _variants(given))


def _variants(given: Arguments) -> Iterator[Arguments]:
    for batch, sizes in ((2, None), (1, (5, 4)), (3, (4, 7)), (1, (1, 1)), (2, (2, 1)), (1, (3, 3))):

        def other(value: Any, batch: int = batch, sizes: tuple[int, int] | None = sizes) -> Any:
            if not isinstance(value, Tensor) or value.dim() < 2:
                return value
            space = [sizes[axis % 2] for axis in range(value.dim() - 2)] if sizes else value.shape[2:]
            made = torch.linspace(-1, 1, batch * value.shape[1] * torch.Size(space).numel())
            return made.view(batch, value.shape[1], *space).to(value)

        yield Arguments(*tree_map(other, (given.args, dict(given.kwargs))))


def _same(module: nn.Module, made: nn.Module, given: Arguments) -> bool:
    try:
        expected = module(*copy.deepcopy(given.args), **copy.deepcopy(given.kwargs))
    except Exception:
        return True
    found = made(*given.args, **given.kwargs)
    pairs = list(zip(tree_leaves(expected), tree_leaves(found), strict=True))
    return all(torch.allclose(a, b, equal_nan=True) if isinstance(a, Tensor) else a == b for a, b in pairs)
