"""What a step is made of: choices, and an operation that fits the values it was made for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Option = TypeVar("Option")


class Unfit(ValueError):
    """The operation does not exist for values of this shape."""


class Pick:
    """Choices spelled as small numbers; where they run out, always the first option."""

    def __init__(self, digits: Sequence[int]) -> None:
        self._digits = iter(digits)

    def of(self, options: Sequence[Option]) -> Option:
        """Return one of the options."""
        return options[next(self._digits, 0) % len(options)]

    def each(self, options: Sequence[Option], times: int) -> tuple[Option, ...]:
        """Return several choices among the same options."""
        return tuple(self.of(options) for _ in range(times))


@dataclass(frozen=True)
class Made:
    """``run(part, *values)`` computes the next value; ``part`` is a child of the program, or None."""

    run: Callable[..., Any]
    part: nn.Module | None = None


def called(module: nn.Module) -> Made:
    """A module that is called."""
    return Made(lambda part, *values: part(*values), module)


def function(run: Callable[..., Tensor]) -> Made:
    """A function of the values alone."""
    return Made(lambda _part, *values: run(*values))


class Holder(nn.Module):
    """Has parameters and buffers, and is read by its parent's forward."""

    def __init__(self, *, buffers: bool = False, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            if buffers:
                self.register_buffer(name, torch.zeros(shape))
            else:
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class Spelled(nn.Module):
    """Runs a step in a forward of its own, as a block of one operation."""

    def __init__(self, made: Made) -> None:
        super().__init__()
        self.made = made.run
        self.part = made.part

    def forward(self, x: Tensor) -> Any:
        return self.made(self.part, x)


def axes_of(x: Tensor) -> int:
    """The number of spatial axes. Raises Unfit where there are none, or none that torch convolves."""
    if not 3 <= x.ndim <= 5:
        raise Unfit(x.shape)
    return x.ndim - 2


def per_channel(x: Tensor, axis: int = 1) -> tuple[int, ...]:
    """The shape of a constant with one number per channel."""
    return tuple(size if place == axis else 1 for place, size in enumerate(x.shape))[1 if axis == 1 else 0 :]
