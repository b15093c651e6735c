"""Transposed convolutions: maps that write at their taps where a convolution reads at them.

Per axis, of n input positions, position i is written to output positions ``stride * i + u`` for the taps u,

    y[o] = b + sum of W[u] x[i] over i and u with stride * i + u = o        for 0 <= o < (n - 1) * stride + growth

with ``u = -padding_before + k * dilation`` for the k-th number of the kernel: the taps of a convolution of this padding
and dilation, as offsets from ``stride * i``. Everything here follows from this line:

    sums                the union of the taps, where strides and growths agree
    T after S           taps t * u + v, of S with stride s and taps u, T with t and v: S writes x[i] at r = s * i + u,
                        and T that at t * r + v
    stride 1            o = i + u reads x[o - u]: the convolution of the taps -u, its kernel turned around

So a convolution of stride 1 goes before and after every transposed one, as one itself.

The law of borders: T sets zeros between the values of S where its stride is more than 1, and writes nothing for the
positions beyond its output. So S has to be zero there: it adds no constant, and none of its taps writes to a position
beyond its output that T would write into its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from repfuse.algebra.geometry import Fits, Geometry, Ints, NotAffine, spread


@dataclass(frozen=True)
class TransposedGeometry(Geometry):
    """Geometry of ``F.conv_transpose*d``, whose own weight has shape ``[in_channels, out_channels / groups, *kernel]``.

    ``output_padding`` is what is added to the output size after it.
    """

    output_padding: Ints = ()

    @property
    def slack(self) -> Ints:
        """The growth: what is added to ``(n - 1) * stride`` for the output size, per axis."""
        axes = zip(self.padding, self.dilation, self.kernel, self.output_padding, strict=True)
        return tuple(d * (k - 1) + extra + 1 - before - after for (before, after), d, k, extra in axes)

    @property
    def pads(self) -> bool:
        """Whether there are zeros between the pixels that the map reads, or around them."""
        return any(stride > 1 for stride in self.stride) or any(map(any, self._beyond))

    @property
    def smallest_input(self) -> Ints:
        """The smallest input size that has an output."""
        return tuple(1 + max(0, math.ceil((1 - a) / s)) for a, s in zip(self.slack, self.stride, strict=True))

    def output_size(self, size: Ints) -> Ints:
        """Spatial size of the output for an input of spatial size ``size``."""
        return tuple((n - 1) * s + a for n, s, a in zip(size, self.stride, self.slack, strict=True))

    def macs(self, source: Ints, output: Ints) -> int:  # noqa: ARG002
        """Multiply-accumulates from shape ``source`` on: every input pixel meets the whole kernel."""
        return math.prod(source) * math.prod(self.kernel) * (self.out_channels // self.groups)

    def describe(self) -> str:
        """Return a short name for people."""
        return f"transposed {super().describe()}"

    def alike(self, other: Geometry) -> tuple[Geometry, Geometry]:
        """Return both as convolutions, where this one has stride 1, or else both as transposed ones."""
        if isinstance(other, TransposedGeometry):
            return self, other
        if set(self.stride) == {1}:
            return self._as_convolution(), other
        return self, _as_transposed(other)

    def _as_convolution(self) -> Geometry:
        """Return the same map, of stride 1, as a convolution: n inputs give ``n - 1 + growth`` outputs."""
        plain = Geometry(self.in_channels, self.out_channels, (), self.stride, (), (), self.groups)
        return plain._on([_turned(axis) for axis in self.taps], tuple(growth - 2 for growth in self.slack))

    def behind(self, offsets: Ints, outer: Geometry) -> tuple[range, ...]:
        """Return the taps of ``self`` as those of the composition, behind the one tap ``offsets`` of ``outer``."""
        axes = zip(self.taps, outer.stride, offsets, strict=True)
        return tuple(range(s * t.start + u, s * t[-1] + u + 1, s * t.step) for t, s, u in axes)

    @property
    def _beyond(self) -> tuple[tuple[int, int], ...]:
        """How many positions before the first, and behind the last, the map would write into its output, per axis.

        Position -i is written up to ``last tap - stride * i``, which is in the output from 0 on; the i-th behind the
        last from ``stride * (n - 1 + i) + first tap`` on, which is in it up to ``stride * (n - 1) + growth - 1``.
        """
        axes = zip(self.taps, self.stride, self.slack, strict=True)
        return tuple((max(0, taps[-1] // s), max(0, (a - 1 - taps[0]) // s)) for taps, s, a in axes)

    def _then(self, outer: Geometry) -> Geometry:
        """Return the geometry of ``outer`` after this map, both of them transposed.

        n inputs give ``m = (n - 1) s + a`` and then ``(m - 1) t + b = (n - 1) s t + (a - 1) t + b`` outputs.
        """
        assert isinstance(outer, TransposedGeometry)
        if not self._is_zero_around(outer):
            reason = f"{outer.describe()} after {self.describe()}, which is not zero beyond its output"
            raise NotAffine("padding-between", reason)
        axes = zip(self.taps, outer.stride, outer.taps, strict=True)
        growth = tuple((a - 1) * t + b for a, t, b in zip(self.slack, outer.stride, outer.slack, strict=True))
        whole = replace(
            self,
            out_channels=outer.out_channels,
            stride=tuple(s * t for s, t in zip(self.stride, outer.stride, strict=True)),
            groups=math.gcd(self.groups, outer.groups),
        )
        return whole._on([spread(t * u + v for u in own for v in outers) for own, t, outers in axes], growth)

    def _fits_beside(self, other: Geometry, *, joined: bool) -> tuple[Fits, ...]:  # noqa: ARG002
        """Return nothing: outputs of two sizes at one size of the input are so at all."""
        return ()

    def _is_zero_around(self, outer: TransposedGeometry) -> bool:
        """Whether no tap writes to one of the positions beyond the output that ``outer`` would write into its own.

        The last position before the output to which tap u < 0 writes is ``u mod stride - stride``; the first behind it
        to which tap u >= growth writes is ``(u - growth) mod stride`` positions further than the first there is.
        """
        axes = zip(self.taps, self.stride, self.slack, outer._beyond, strict=True)
        return all(
            all(u % s - s < -before for u in taps if u < 0) and all((u - a) % s >= after for u in taps if u >= a)
            for taps, s, a, (before, after) in axes
        )

    def _on(self, axes: Sequence[range], slack: Ints) -> TransposedGeometry:
        """Return this geometry with other taps and growth, and with more taps where PyTorch has no module for these."""
        laid = list(map(_storable, axes, slack, self.stride))
        extra = tuple(growth - 1 - axis[-1] - axis[0] for axis, growth in zip(laid, slack, strict=True))
        return replace(
            self,
            kernel=tuple(map(len, laid)),
            padding=tuple((-axis[0], -axis[0]) for axis in laid),
            dilation=tuple(axis.step for axis in laid),
            output_padding=extra,
        )


def _storable(axis: range, growth: int, stride: int) -> range:
    """Return the axis with as few more taps as it takes for the same padding, of at least 0, before and after.

    ``output_padding = growth - 1 - last tap - first tap`` has to be at least 0, and less than the stride or dilation.
    """
    first, last, step = axis[0], axis[-1], axis.step
    first -= step * math.ceil(max(first, 0) / step)
    extra = growth - 1 - last - first
    if extra < 0:
        first -= step * math.ceil(-extra / step)
    else:
        last += step * max(0, math.ceil((extra + 1 - max(stride, step)) / step))
    return range(first, last + 1, step)


def _turned(axis: range) -> range:
    return range(-axis[-1], -axis[0] + 1, axis.step)


def _as_transposed(plain: Geometry) -> TransposedGeometry:
    """Return a convolution of stride 1 as a transposed one, which PyTorch need not have a module for."""
    if set(plain.stride) != {1}:
        reason = f"{plain.describe()}, which has a stride, with a transposed convolution that has one"
        raise NotAffine("transposed-convolution", reason)
    if plain.padding_mode != "zeros" and not plain.keeps_edges:
        raise NotAffine("padding-mode", f"{plain.describe()} with a transposed convolution")
    taps, growth = [_turned(axis) for axis in plain.taps], [slack + 2 for slack in plain.slack]
    return TransposedGeometry(
        plain.in_channels,
        plain.out_channels,
        plain.kernel,
        plain.stride,
        tuple((-axis[0], axis[-1] + 1 - a) for axis, a in zip(taps, growth, strict=True)),
        plain.dilation,
        plain.groups,
        output_padding=(0,) * plain.ndim,
    )
