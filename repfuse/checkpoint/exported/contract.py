"""What an exported program promises of its inputs: which axes are dynamic, in which range, and which are alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

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
    symbols = list(dict.fromkeys(symbol for shape in shapes for size in shape for symbol in _symbols(size)))
    names = {symbol: f"d{index}" for index, symbol in enumerate(symbols)}
    axes = tuple(tuple(_named(size, names) for size in shape) for shape in shapes)
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
    return tuple(
        {axis: _dim(program, size, dims) for axis, size in enumerate(shape) if isinstance(size, torch.SymInt)}
        for shape in _shapes(program)
    )


def automatic(program: ExportedProgram) -> tuple[dict[int, Any], ...]:
    """As ``dims_of``, with sizes that torch.export relates to each other by itself."""
    return tuple(
        {axis: _automatic(program, size) for axis, size in enumerate(shape) if isinstance(size, torch.SymInt)}
        for shape in _shapes(program)
    )


def _automatic(program: ExportedProgram, size: torch.SymInt) -> Any:
    low, high = range_of(program, size.node.expr)
    return Dim.AUTO(min=low or None, max=high)


def range_of(program: ExportedProgram, symbol: Any) -> tuple[int | None, int | None]:
    """Return the smallest and largest value of a symbol, None where there is no largest."""
    found = program.range_constraints.get(symbol)
    return (None, None) if found is None else (_bound(found.lower), _bound(found.upper))


def _shapes(program: ExportedProgram) -> list[tuple[Any, ...]]:
    """Return the shape of each input; a dynamic size is a SymInt, whatever the stubs of torch say."""
    return [tuple(map(_settled, value.shape)) for value in input_values(program)]


def _settled(size: Any) -> Any:
    """Return a SymInt that stands for one number as this number."""
    return int(size) if isinstance(size, torch.SymInt) and not size.node.expr.free_symbols else size


def _dim(program: ExportedProgram, size: torch.SymInt, dims: dict[Any, Any]) -> Any:
    expression = size.node.expr
    (symbol,) = expression.free_symbols
    if symbol not in dims:
        low, high = range_of(program, symbol)
        dims[symbol] = Dim(f"d{len(dims)}", min=low or None, max=high)
    offset = int(expression.subs(symbol, 0))
    factor = int(expression.subs(symbol, 1)) - offset
    if expression != factor * symbol + offset:
        raise ValueError(f"the size {expression} of an input is no multiple of another")
    scaled = factor * dims[symbol] if factor != 1 else dims[symbol]
    return scaled + offset if offset else scaled


def _symbols(size: Any) -> Iterator[Any]:
    if isinstance(size, torch.SymInt):
        yield from sorted(size.node.expr.free_symbols, key=str)


def _named(size: Any, names: dict[Any, str]) -> Axis:
    if not isinstance(size, torch.SymInt):
        return int(size)
    return str(size.node.expr.subs({symbol: type(symbol)(name) for symbol, name in names.items()}))


def _bound(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError, AttributeError):  # an infinity
        return None
