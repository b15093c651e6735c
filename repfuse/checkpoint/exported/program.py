"""An exported program: what it promises of its inputs, and its network, which is called with plain tensors.

The promise is which axes are dynamic, in which range, and which are alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from repfuse.checkpoint.example import random_tensor
from repfuse.checkpoint.recognise import damaged
from repfuse.errors import RepfuseError
from repfuse.wording import described

Axis = int | str  # a fixed size, or an expression of dynamic sizes


@dataclass(frozen=True)
class Contract:
    """``axes`` of each tensor input; dynamic sizes are named d0, d1, ... in their order, ``ranges`` are theirs."""

    axes: tuple[tuple[Axis, ...], ...]
    ranges: tuple[tuple[str, int | None, int | None], ...]

    def describe(self) -> str:
        """Return the shapes as text: ``d0x3xd1xd2``, with the ranges."""
        shapes = ", ".join("x".join(map(str, axes)) for axes in self.axes)
        ranges = ", ".join(f"{name} from {low} to {high or 'any'}" for name, low, high in self.ranges)
        return f"{shapes} ({ranges})" if ranges else shapes

    def admits(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Whether the axes that are fixed have the sizes of these ``shapes``."""
        pairs = (zip(axes, shape, strict=True) for axes, shape in zip(self.axes, shapes, strict=True))
        return all(axis == size for pair in pairs for axis, size in pair if isinstance(axis, int))


def contract_of(program: ExportedProgram) -> Contract:
    """Return what ``program`` promises of its inputs."""
    shapes = _shapes(program)
    dynamic = (size.node.expr for shape in shapes for size in shape if isinstance(size, torch.SymInt))
    symbols = list(dict.fromkeys(symbol for size in dynamic for symbol in sorted(size.free_symbols, key=str)))
    names = {symbol: f"d{index}" for index, symbol in enumerate(symbols)}

    def axis(size: Any) -> Axis:
        if not isinstance(size, torch.SymInt):
            return int(size)
        return str(size.node.expr.subs({symbol: type(symbol)(name) for symbol, name in names.items()}))

    axes = tuple(tuple(map(axis, shape)) for shape in shapes)
    return Contract(axes, tuple((names[symbol], *range_of(program, symbol)) for symbol in symbols))


def input_values(program: ExportedProgram) -> list[torch.Tensor]:
    """Return the placeholders' fake tensors, in the order of the flattened inputs."""
    wanted = set(program.graph_signature.user_inputs)
    return [node.meta["val"] for node in program.graph.find_nodes(op="placeholder") if node.name in wanted]


def dims_of(program: ExportedProgram) -> tuple[dict[int, Any], ...]:
    """Return the dynamic shapes of the flattened inputs as torch.export.export takes them.

    An axis is a Dim, or k * Dim + c where the program says so. Raises ValueError where it is no such expression.
    """
    dims: dict[Any, Any] = {}
    return _dynamic(program, lambda size: _dim(program, size, dims))


def automatic(program: ExportedProgram) -> tuple[dict[int, Any], ...]:
    """As ``dims_of``, with sizes that torch.export relates to each other by itself."""
    return _dynamic(program, lambda size: Dim.AUTO(**_limits(program, size.node.expr)))


def _dynamic(program: ExportedProgram, dim: Callable[[torch.SymInt], Any]) -> tuple[dict[int, Any], ...]:
    return tuple(
        {axis: dim(size) for axis, size in enumerate(shape) if isinstance(size, torch.SymInt)}
        for shape in _shapes(program)
    )


def _limits(program: ExportedProgram, symbol: Any) -> dict[str, int | None]:
    low, high = range_of(program, symbol)
    return {"min": low or None, "max": high}


def range_of(program: ExportedProgram, symbol: Any) -> tuple[int | None, int | None]:
    """Return the smallest and largest value of a symbol, None where there is no largest."""
    found = program.range_constraints.get(symbol)
    return (None, None) if found is None else (_bound(found.lower), _bound(found.upper))


def _shapes(program: ExportedProgram) -> list[tuple[Any, ...]]:
    """Return the shape of each input; a dynamic size is a SymInt, unless it stands for one number."""

    def settled(size: Any) -> Any:
        return int(size) if isinstance(size, torch.SymInt) and not size.node.expr.free_symbols else size

    return [tuple(map(settled, value.shape)) for value in input_values(program)]


def _dim(program: ExportedProgram, size: torch.SymInt, dims: dict[Any, Any]) -> Any:
    expression = size.node.expr
    (symbol,) = expression.free_symbols
    if symbol not in dims:
        dims[symbol] = Dim(f"d{len(dims)}", **_limits(program, symbol))
    offset = int(expression.subs(symbol, 0))
    factor = int(expression.subs(symbol, 1)) - offset
    if expression != factor * symbol + offset:
        raise ValueError(f"the size {expression} of an input is no multiple of another")
    scaled = factor * dims[symbol] if factor != 1 else dims[symbol]
    return scaled + offset if offset else scaled


def _bound(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError, AttributeError):  # an infinity
        return None


LARGEST = 1 << 26  # numbers that inputs may have without being asked for


def opened(program: ExportedProgram, path: Path) -> fx.GraphModule:
    """Return the network of the program in the file at ``path``, which gets an example where it has none.

    Raises RepfuseError where its parts do not fit each other, or where it takes more than tensors.
    """
    try:
        return network_of(complete(program, path))
    except RepfuseError:
        raise
    except Exception as error:  # torch makes code of what the file says, and runs it: anything may be wrong with it
        raise damaged(path, described(error)) from error


def network_of(program: ExportedProgram) -> fx.GraphModule:
    """Return the program's network: its flattened inputs are its arguments, its outputs are nested as the program's.

    It refuses what the program refuses: the guards are part of its graph.
    """
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    (output,) = graph.find_nodes(op="output")
    if program.call_spec.out_spec is not None:
        output.args = (pytree.tree_unflatten(list(output.args[0]), program.call_spec.out_spec),)
    graph.set_codegen(CodeGen())
    network = fx.GraphModule(module, graph)  # without the methods and hooks that torch.export put on the other
    return network.eval()


def complete(program: ExportedProgram, path: Path) -> ExportedProgram:
    """Give the program an example where its file has none, and return it.

    Raises RepfuseError where an input is no tensor.
    """
    values = input_values(program)
    if len(values) != len(program.graph_signature.user_inputs) or not all(isinstance(v, Tensor) for v in values):
        raise RepfuseError(
            f"{path} takes inputs that are no tensors.",
            "repfuse calls a network with tensors alone.",
            "Export it with those inputs fixed: functools.partial, or default values.",
        )
    if program.example_inputs is None or not pytree.tree_leaves(program.example_inputs):
        assert program.call_spec.in_spec is not None
        shapes = [[_example_of(size) for size in value.shape] for value in values]
        if sum(map(math.prod, shapes)) > LARGEST:
            what = f"{path} has no sample inputs, and the inputs that it describes would be very large."
            raise RepfuseError(what, "", "Export it again from a smaller example.")
        seeds = (torch.Generator().manual_seed(number) for number in range(len(values)))
        given = zip(shapes, values, seeds, strict=True)
        made = [random_tensor(shape, value.dtype, seed) for shape, value, seed in given]
        program.example_inputs = pytree.tree_unflatten(made, program.call_spec.in_spec)
    return program


def flat_inputs(program: ExportedProgram) -> tuple[Tensor, ...]:
    """Return the program's example as the arguments of its network."""
    return tuple(pytree.tree_leaves(program.example_inputs))


def _example_of(size: int | torch.SymInt) -> int:
    """Return a size as it was when the program was exported; 2 where nobody knows."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 2
