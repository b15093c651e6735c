"""Inputs like an example, with other values, batches and sizes.

The network says nowhere which axes are spatial. Channels come first in most networks (``[B, C, H, W]``), last in some
and in sequences of tokens (``[B, N, C]``): both readings are tried, and the network refuses the wrong one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from repfuse.checking.inputs.kinds import Kind, noise
from repfuse.checking.inputs.trial import Shape, is_floating

MULTIPLE = 32  # the total stride of many networks, some of which take its multiples only


@dataclass(frozen=True)
class Place:
    """Where and how large: the spatial axes, and the size along them (none: the example's own)."""

    axes: Shape
    size: Shape = ()

    @property
    def name(self) -> str:
        """The size as text."""
        return "x".join(map(str, self.size))


class Example:
    """The example's inputs out of their tuples, lists and dicts; ``rebuilt`` puts others in."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        leaves, self._structure = tree_flatten(tuple(inputs))
        self.leaves: tuple[Any, ...] = tuple(leaves)

    def rebuilt(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """Return the inputs with these leaves."""
        return tuple(tree_unflatten(list(leaves), self._structure))

    @cached_property
    def batch(self) -> int | None:
        """The batch of the first tensor that has one."""
        return next((x.shape[0] for x in self.leaves if isinstance(x, torch.Tensor) and x.dim()), None)

    @cached_property
    def floating(self) -> bool:
        """Whether any input is of floating numbers."""
        return any(is_floating(x) for x in self.leaves)

    @cached_property
    def main(self) -> Shape:
        """The shape of the first floating input with spatial axes, else of one with features, or ()."""
        shapes = [tuple(x.shape) for x in self.leaves if is_floating(x)]
        spatial = (shape for shape in shapes if is_spatial(shape))
        return next(spatial, next((shape for shape in shapes if len(shape) == 2), ()))

    @cached_property
    def readings(self) -> tuple[Shape, ...]:
        """The spatial axes, as channels come first and as they come last."""
        ndim = len(self.main)
        return (tuple(range(2, ndim)), tuple(range(1, ndim - 1))) if is_spatial(self.main) else ()

    def size(self, axes: Shape) -> Shape:
        """Return the example's size along these axes."""
        return tuple(self.main[axis] for axis in axes)

    def reduced(self, part: int, least: int = 1) -> list[Place]:
        """Return places of about a ``part``-th of the size, not square, odd and even, then multiples of MULTIPLE.

        Those that are smaller than ``least`` along an axis are left out.
        """
        places = []
        for axes in self.readings:
            own = self.size(axes)
            places.append(Place(axes, tuple(max(1, n // part + number % 2) for number, n in enumerate(own))))
            whole = tuple((n // part // MULTIPLE + (number + 1) % 2) * MULTIPLE for number, n in enumerate(own))
            if all(0 < new < n for new, n in zip(whole, own, strict=True)):
                places.append(Place(axes, whole))
        return [place for place in dict.fromkeys(places) if min(place.size) >= least]

    def larger(self) -> Iterator[list[Place]]:
        """Yield, for each spatial axis, places where it is larger than in the example and the others an eighth.

        Odd steps first, then the next multiple of MULTIPLE, then twice the size.
        """
        for number in range(len(self.readings[0]) if self.readings else 0):
            places = []
            for axes in self.readings:
                own = self.size(axes)
                for more in (own[number] + 5, (own[number] // MULTIPLE + 1) * MULTIPLE, 2 * own[number]):
                    least = MULTIPLE if more % MULTIPLE == 0 else 1
                    others = (max(n // 8 // least * least, min(n, least)) for n in own)
                    size = tuple(more if place == number else n for place, n in enumerate(others))
                    places += [Place(axes, size), Place(axes, (*own[:number], more, *own[number + 1 :]))]
            yield list(dict.fromkeys(places))

    def inputs(self, kind: Kind, place: Place, seed: int, batch: int | None = None) -> tuple[Any, ...]:
        """Return new inputs: floating ones of this kind and size, others with their values; all of this batch."""
        return tuple(self._leaf(x, kind, place, seed + 1000 * number, batch) for number, x in enumerate(self.leaves))

    def _leaf(self, x: Any, kind: Kind, place: Place, seed: int, batch: int | None) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        shape = list(x.shape)
        if place.size and self._follows(x, place.axes):
            for axis, n in zip(place.axes, place.size, strict=True):
                shape[axis] = n
        if batch is not None and shape[:1] == [self.batch]:
            shape[0] = batch
        if not x.is_floating_point():
            return _repeated(x, shape[0]) if shape else x
        axes = place.axes if len(shape) > max(place.axes, default=0) else (1,)
        return _made(x, kind, tuple(shape), axes, seed)

    def _follows(self, x: torch.Tensor, axes: Shape) -> bool:
        """Whether an input has the size that is changed."""
        same_rank = is_floating(x) and x.dim() == len(self.main)
        return same_rank and all(x.shape[axis] == self.main[axis] for axis in axes)

    def small(self, sizes: Sequence[int]) -> Iterator[list[Place]]:
        """Yield these sizes along every axis, as far as they are smaller than the example, in each reading."""
        for n in sizes:
            places = [Place(axes, (n,) * len(axes)) for axes in self.readings if n < min(self.size(axes))]
            if places:
                yield places


def _made(like: torch.Tensor, kind: Kind, shape: Shape, axes: Shape, seed: int) -> torch.Tensor:
    """Return a tensor of this kind; what has no such axes can only be noise."""
    generator = torch.Generator().manual_seed(seed)
    sound = bool(axes) and max(axes) < len(shape) and all(shape)
    return (kind if sound else noise)(shape, axes, generator).to(dtype=like.dtype, device=like.device)


def is_spatial(shape: Shape) -> bool:
    """Whether a shape has a batch, channels, and one to three spatial axes."""
    return 3 <= len(shape) <= 5


def _repeated(x: torch.Tensor, batch: int) -> torch.Tensor:
    """Return the samples of ``x``, over again where there are too few."""
    return x if batch == x.shape[0] else x[torch.arange(batch) % x.shape[0]]
