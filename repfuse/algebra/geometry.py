"""The shape of a convolution without its weights: which taps it reads, and when two of them are one.

A tap is an offset from the output position times the stride to an input position. Per axis, tap ``i`` of a kernel
lies at ``-padding_before + i * dilation``, and the output has ``floor((n + slack) / stride) + 1`` positions, where
``slack = padding_before + padding_after - dilation * (kernel - 1) - 1``. Everything here follows from these two
lines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

Ints = tuple[int, ...]
Padding = tuple[tuple[int, int], ...]


class NotAffine(Exception):
    """Two maps cannot be one. ``code`` is a key of ``repfuse.refusals.REFUSALS``."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(frozen=True)
class Geometry:
    """Geometry of ``y = W ⋆ x + b`` with W of shape ``[out_channels, in_channels / groups, *kernel]``.

    ``padding`` is (before, after) per axis; ``padding_mode`` is that of ``torch.nn.Conv2d``.
    """

    in_channels: int
    out_channels: int
    kernel: Ints
    stride: Ints
    padding: Padding
    dilation: Ints
    groups: int = 1
    padding_mode: str = "zeros"

    @staticmethod
    def identity(channels: int, ndim: int) -> Geometry:
        """Geometry of ``y = x``: a 1x1 kernel per channel."""
        ones = (1,) * ndim
        return Geometry(channels, channels, ones, ones, ((0, 0),) * ndim, ones, groups=channels)

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @property
    def weight_shape(self) -> Ints:
        """Shape of the weight, ``[out_channels, in_channels / groups, *kernel]``."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def taps(self) -> tuple[range, ...]:
        """Offsets of the taps per axis."""
        return tuple(
            range(-before, -before + dilation * (kernel - 1) + 1, dilation)
            for (before, _), dilation, kernel in zip(self.padding, self.dilation, self.kernel, strict=True)
        )

    @property
    def slack(self) -> Ints:
        """What is added to the input size before dividing by the stride, per axis."""
        return tuple(
            before + after - dilation * (kernel - 1) - 1
            for (before, after), dilation, kernel in zip(self.padding, self.dilation, self.kernel, strict=True)
        )

    @property
    def pads(self) -> bool:
        """Whether the map reads outside its input."""
        return any(before or after for before, after in self.padding)

    def output_size(self, size: Ints) -> Ints:
        """Spatial size of the output for an input of spatial size ``size``; not positive where there is none."""
        return tuple((n + a) // s + 1 for n, a, s in zip(size, self.slack, self.stride, strict=True))

    def add(self, other: Geometry) -> Geometry:
        """Geometry of the sum of two maps of one source: the union of the taps, the gcd of the groups.

        Exact where the strides agree and, for every input size n, ``floor((n + a) / s) = floor((n + b) / s)``, that is
        a = b. Raises NotAffine where it is not.
        """
        self._check_same_ends(other)
        axes = [_union(mine, its) for mine, its in zip(self.taps, other.taps, strict=True)]
        padding = tuple((-taps.start, slack + 1 + taps[-1]) for taps, slack in zip(axes, self.slack, strict=True))
        return replace(
            self,
            kernel=tuple(len(taps) for taps in axes),
            padding=padding,
            dilation=tuple(taps.step for taps in axes),
            groups=math.gcd(self.groups, other.groups),
        )

    def _check_same_ends(self, other: Geometry) -> None:
        if (self.ndim, self.in_channels, self.out_channels) != (
            other.ndim,
            other.in_channels,
            other.out_channels,
        ):
            raise NotAffine("channel-mismatch", f"{self.ends} beside {other.ends}")
        if self.stride != other.stride:
            raise NotAffine("stride-mismatch", f"stride {self.stride} beside stride {other.stride}")
        if self.slack != other.slack:
            raise NotAffine(
                "size-mismatch",
                f"{self.describe()} beside {other.describe()}: equal output sizes for some input sizes at most",
            )
        for mode in (self.padding_mode, other.padding_mode):
            if mode != "zeros":
                raise NotAffine("padding-mode", f"padding_mode={mode!r} in a sum")

    @property
    def ends(self) -> str:
        """Channels in and out, for messages."""
        return f"{self.in_channels}->{self.out_channels} channels"

    def describe(self) -> str:
        """Return a short name for people, such as ``3x3 stride 2 groups 4``."""
        parts = ["x".join(map(str, self.kernel))]
        if any(s != 1 for s in self.stride):
            parts.append(f"stride {_one_or_all(self.stride)}")
        if any(d != 1 for d in self.dilation):
            parts.append(f"dilation {_one_or_all(self.dilation)}")
        if self.groups == self.in_channels == self.out_channels and self.groups > 1:
            parts.append("depthwise")
        elif self.groups > 1:
            parts.append(f"groups {self.groups}")
        if self.padding_mode != "zeros":
            parts.append(self.padding_mode)
        return " ".join(parts)


def _union(a: range, b: range) -> range:
    """Return the smallest evenly spaced set of taps that holds both."""
    low, high = min(a[0], b[0]), max(a[-1], b[-1])
    gaps = [tap - low for tap in (*a, *b)]
    step = math.gcd(*gaps) or 1
    return range(low, high + 1, step)


def _one_or_all(values: Ints) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))
