"""A call of an operator, whatever its spelling: the operator's name, and its arguments by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import fx

from repfuse.recording.constants import called

if TYPE_CHECKING:
    from repfuse.recording.recording import Recording


@dataclass(frozen=True)
class Constant:
    """A tensor that depends on parameters and buffers alone: name (see ``repfuse.algebra.layers``) and shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """What ``node`` calls: ``operator`` is a key of ``repfuse.ops.table.ROWS``."""

    node: fx.Node
    operator: str
    given: Mapping[str, Any]
    in_place: bool = False

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument, or ``default`` where the call leaves it out."""
        return self.given.get(name, default)

    @property
    def input(self) -> Any:
        """The first argument of nearly every operator."""
        return self.given.get("input")


def is_data(value: Any, recording: Recording) -> TypeGuard[fx.Node]:
    """Whether the value is a tensor that depends on the input of the model."""
    return isinstance(value, fx.Node) and value in recording.shape_of and recording.constants.name_of(value) is None


def constant(value: Any, recording: Recording) -> Constant | None:
    """Return the constant that an argument is, or None."""
    name = recording.constants.name_of(value)
    return None if name is None else Constant(name, recording.constants.shape(name))


def number(value: Any) -> float | None:
    """Return a finite number that is written in the code, or None."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def makes_zeros(node: fx.Node) -> bool:
    """Whether a node returns a new tensor of zeros."""
    return called(node) in ("zeros", "zeros_like", "new_zeros")


def contains_node(value: Any) -> bool:
    """Whether an argument, or anything in its lists, is computed in forward."""
    return any(map(contains_node, value)) if isinstance(value, list | tuple) else isinstance(value, fx.Node)


def axis_of(dim: Any, rank: int) -> int | None:
    """Return the axis that ``dim`` names among ``rank``, counted from the front; None where it is not a literal."""
    usable = isinstance(dim, int) and not isinstance(dim, bool) and -rank <= dim < rank
    return dim % rank if usable else None


def is_channel_axis(axis: int | None, rank: int) -> TypeGuard[int]:
    """Whether the axis may hold the channels: axis 1 for convolutions, the last for linear layers."""
    return axis is not None and axis > 0 and axis in (1, rank - 1)


def axes_turned(call: Call, rank: int) -> list[int] | None:
    """Return the axes, of ``rank``, in the order in which a transpose or a permutation puts them."""
    if call.operator == "permute":
        given = call.get("dims", ())
        order = [axis_of(dim, rank) for dim in given] if isinstance(given, list | tuple) else []
    else:
        one, other = axis_of(call.get("dim0"), rank), axis_of(call.get("dim1"), rank)
        order = [*range(rank)]
        if one is not None and other is not None:
            order[one], order[other] = other, one
        else:
            order = []
    usable = [axis for axis in order if axis is not None]
    return usable if sorted(usable) == [*range(rank)] else None
