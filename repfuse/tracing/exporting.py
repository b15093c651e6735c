"""Blocks that symbolic tracing cannot follow, as torch.export reads them: shape arithmetic, loops over sizes.

An exported graph holds for the sizes that it was made for. Only one that holds for all of them will do: of every input
each axis is a symbol of its own, without a guard, or the block itself takes no other size there (channels), and the
graph gives what the block gives at sizes down to one pixel, which torch.export takes for larger.
"""

from __future__ import annotations

import copy
import inspect
import io
import re
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils._sympy.numbers import int_oo

from repfuse.quiet import quietly
from repfuse.tracing.arguments import Arguments
from repfuse.tracing.skeleton import copy_with

LARGEST = 16
"""Convolutions in a block: what is larger is a network, and keeps its class."""


def is_block(module: nn.Module) -> bool:
    """Whether a module is small enough to be one block, and has convolutions."""
    return 0 < sum(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules()) <= LARGEST


def export(module: nn.Module, arguments: Arguments) -> fx.GraphModule | None:
    """Return ``module`` as one graph over its own tensors; None where torch.export cannot, or not for all sizes."""
    given = Arguments(*tree_map(_in_a_batch, (arguments.args, dict(arguments.kwargs))))
    try:
        said = io.StringIO()  # torch.export prints the graph up to where it failed
        with quietly(), redirect_stdout(said), redirect_stderr(said), torch.no_grad():
            shapes = _dynamic_shapes(module, given)
            program = torch.export.export(module, given.args, dict(given.kwargs), dynamic_shapes=shapes)
            if not _holds_for_all_sizes(program) or _takes_others(module, given, _fixed_axes(program)):
                return None
            graph_module = _without_guards(program.module())
            return graph_module if _agree(module, graph_module, given) else None
    except Exception:  # torch.export can fail in any way, and then the block stays as it is
        return None


def _in_a_batch(value: Any) -> Any:
    """Repeat a batch of one: torch.export takes sizes of 1 for fixed. Every tensor becomes one of its own: what is
    given twice at the example need not be the same in another call.
    """
    if not isinstance(value, Tensor):
        return value
    one = value.dim() > 1 and value.shape[0] == 1
    return value.repeat(2, *[1] * (value.dim() - 1)) if one else value.clone()


def _dynamic_shapes(module: nn.Module, given: Arguments) -> dict[str, Any]:
    """Say of each argument that all its axes may have any size. Raises TypeError for a forward with ``*args``."""
    bound = inspect.signature(module.forward).bind(*given.args, **given.kwargs)
    if any(parameter.kind in _STARRED for parameter in bound.signature.parameters.values()):
        raise TypeError("what the arguments are called is not known")
    return {name: tree_map(_axes, value) for name, value in bound.arguments.items()}


_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _axes(value: Any) -> Any:
    return dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO) if isinstance(value, Tensor) else None


_FIXED = re.compile(r"[^ ]+\.size\(\)\[\d+\] == \d+")
"""A guard that says the size of an axis."""


def _holds_for_all_sizes(program: Any) -> bool:
    limits = program.range_constraints.values()
    guards = [guard for guard in program._guards_code if not _FIXED.fullmatch(guard)]  # of these see _fixed_axes
    if guards or any(limit.lower > 2 or limit.upper != int_oo for limit in limits):
        return False
    free = ([str(size) for size in shape if not str(size).isdigit()] for shape in _shapes(program))
    return all(len(set(sizes)) == len(sizes) for sizes in free)


def _shapes(program: Any) -> list[Any]:
    nodes = (node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    return [node.meta["val"].shape for node in nodes if isinstance(node.meta.get("val"), Tensor)]


def _fixed_axes(program: Any) -> list[tuple[int, int]]:
    """Return the axes whose size the graph takes for a number: which tensor, which axis."""
    shapes = enumerate(_shapes(program))
    return [(which, axis) for which, shape in shapes for axis, size in enumerate(shape) if str(size).isdigit()]


def _takes_others(module: nn.Module, given: Arguments, axes: list[tuple[int, int]]) -> bool:
    """Whether the module runs with another size than the given one at one of these axes."""
    return any(_runs(module, _resized(given, *place, size)) for place in axes for size in _other_sizes(given, *place))


def _tensors(given: Arguments) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((given.args, dict(given.kwargs))) if isinstance(leaf, Tensor)]


def _other_sizes(given: Arguments, which: int, axis: int) -> set[int]:
    """Return sizes to try: those around, and those of the other tensors, to which this one may be broadcast."""
    tensors = _tensors(given)
    size = tensors[which].shape[axis]
    return {1, size - 1, size + 1, 2 * size, *(x.shape[axis] for x in tensors if x.dim() > axis)} - {0, size}


def _resized(given: Arguments, which: int, axis: int, size: int) -> Arguments:
    leaves, structure = tree_flatten((given.args, dict(given.kwargs)))
    place = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)][which]
    repeats = torch.arange(size) % leaves[place].shape[axis]
    leaves[place] = leaves[place].index_select(axis, repeats.to(leaves[place].device))
    return Arguments(*tree_unflatten(leaves, structure))


def _runs(module: nn.Module, given: Arguments) -> bool:
    try:
        copy_with(module, {})(*copy.deepcopy(given.args), **copy.deepcopy(given.kwargs))
    except Exception:
        return False
    return True


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
    yield Arguments(*tree_map(_channels_last, (given.args, dict(given.kwargs))))


def _channels_last(value: Any) -> Any:
    image = isinstance(value, Tensor) and value.dim() == 4
    return value.to(memory_format=torch.channels_last) if image else value


def _same(module: nn.Module, made: nn.Module, given: Arguments) -> bool:
    try:
        expected = module(*copy.deepcopy(given.args), **copy.deepcopy(given.kwargs))
    except Exception:
        return True
    found = made(*given.args, **given.kwargs)
    pairs = list(zip(tree_leaves(expected), tree_leaves(found), strict=True))
    return all(torch.allclose(a, b, equal_nan=True) if isinstance(a, Tensor) else a == b for a, b in pairs)
