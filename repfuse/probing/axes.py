"""One spatial axis of a map as index arithmetic: which place of the input each output reads through each tap."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

OUTSIDE = -1
"""Stands for a place beyond the border, where there is a zero."""


@dataclass(frozen=True)
class Pad:
    """Places before and after the input, cut off where negative; ``mode`` as in ``torch.nn.Conv2d``."""

    before: int
    after: int
    mode: str = "zeros"

    def around(self, places: list[int]) -> list[int] | None:
        """Return the places with those before and after them; None where the input is too small for that."""
        size = len(places)
        if self.mode == "reflect" and max(self.before, self.after) >= size:
            return None
        if self.mode == "circular" and max(self.before, self.after) > size:
            return None
        kept = range(-self.before, size + self.after)
        return [places[i] if 0 <= i < size else self._beyond(i, places) for i in kept]

    def _beyond(self, i: int, places: list[int]) -> int:
        size = len(places)
        if self.mode == "reflect":
            return places[-i if i < 0 else 2 * (size - 1) - i]
        if self.mode == "replicate":
            return places[0 if i < 0 else -1]
        return places[i % size] if self.mode == "circular" else OUTSIDE


@dataclass(frozen=True)
class Window:
    """The axis of a convolution: output q reads ``q * stride + k * dilation`` of the input after its pads."""

    kernel: int
    stride: int = 1
    dilation: int = 1
    pads: tuple[Pad, ...] = ()

    @property
    def phases(self) -> int:
        """How many places in a row show all the taps between them."""
        return self.stride

    def reads(self, size: int) -> Tensor | None:
        """Return ``[outputs, kernel]``: the place that is read, or ``size`` for none. None where there is no output."""
        places: list[int] | None = list(range(size))
        for pad in self.pads:
            places = pad.around(places) if places is not None else None
        outputs = (len(places or ()) - self.dilation * (self.kernel - 1) - 1) // self.stride + 1
        if places is None or outputs < 1:
            return None
        table = torch.tensor([size if place == OUTSIDE else place for place in places])
        q, k = torch.arange(outputs)[:, None], torch.arange(self.kernel)
        return table[q * self.stride + k * self.dilation]


@dataclass(frozen=True)
class Spread:
    """The axis of a transposed convolution: place p is written to ``p * up + k * dilation - before`` of the output.

    The output has ``(size - 1) * up + growth`` places.
    """

    kernel: int
    up: int
    before: int
    growth: int
    dilation: int = 1

    @property
    def phases(self) -> int:
        """One place shows every tap."""
        return 1

    def reads(self, size: int) -> Tensor | None:
        """Return ``[outputs, kernel]``: the place that is read, or ``size`` for none. None where there is no output."""
        outputs = (size - 1) * self.up + self.growth
        if outputs < 1:
            return None
        of = torch.arange(outputs)[:, None] + self.before - torch.arange(self.kernel) * self.dilation
        inside = (of % self.up == 0) & (of >= 0) & (of < size * self.up)
        return torch.where(inside, of // self.up, size)


Axis = Window | Spread


def centre(axis: Axis, size: int) -> range:
    """Return the places in the middle of an input that show the taps between them."""
    first = max(0, (size - axis.phases) // 2)
    return range(first, min(size, first + axis.phases))


@lru_cache(maxsize=256)
def core(axis: Axis) -> int | None:
    """Return the smallest size of which the middle shows every tap; None where there is none within reason."""
    most = 4 * (axis.dilation * axis.kernel + axis.phases) + 2 * sum(abs(x) for x in _amounts(axis)) + 4
    return next((size for size in range(_least(axis), most) if shows_all(axis, size)), None)


def _least(axis: Axis) -> int:
    """Return the size from which on no two taps read one place, where beyond the border is the input again."""
    again = isinstance(axis, Window) and any(pad.mode != "zeros" for pad in axis.pads)
    return axis.dilation * (axis.kernel - 1) + 1 if again else 1


def _amounts(axis: Axis) -> list[int]:
    if isinstance(axis, Spread):
        return [axis.before, axis.growth]
    return [amount for pad in axis.pads for amount in (pad.before, pad.after)]


def shows_all(axis: Axis, size: int) -> bool:
    """Whether the middle of an input of this size shows every tap."""
    table = axis.reads(size)
    if table is None:
        return False
    middle = torch.tensor(list(centre(axis, size)))
    return bool(torch.isin(table, middle).any(0).all())
