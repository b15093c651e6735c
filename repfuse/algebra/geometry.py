"""The shape of a convolution without its weights: which taps it reads, and when two of them are one.

A tap is an offset from the output position times the stride to an input position. Per axis, tap ``i`` of a kernel
lies at ``-padding_before + i * dilation``, and the output has ``floor((n + slack) / stride) + 1`` positions, where
``slack = padding_before + padding_after - dilation * (kernel - 1) - 1``. Everything here follows from these two
lines. Negative padding is a crop: the first tap is then right of the output position.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

# The law of borders: what a map that pads meets beyond the output of the map before it.
#
# Think of x as continued by zeros without end; then a map has values beyond its output too. Padding its output with
# zeros is exact only where those values are zero, and padding with a number only where they are that number.


def common_mode(inner: Geometry, outer: Geometry) -> str | None:
    """Return the padding mode of ``outer`` after ``inner``; None where no single convolution pads like that.

    A padding that copies pixels, as all modes but zeros do, commutes with a map of single pixels, shift included.
    Padding first and then reading what is there, as ``outer`` without padding does, is the composition already.
    Nothing else is claimed: on axes that ``outer`` does not pad, and where it crops, more would be exact.
    """
    if outer.padding_mode != "zeros" and not outer.keeps_edges:
        pixelwise = inner.keeps_edges and set(inner.kernel + inner.stride) <= {1}
        return outer.padding_mode if pixelwise else None
    if inner.padding_mode != "zeros" and not inner.keeps_edges:
        return inner.padding_mode if outer.keeps_edges else None
    return "zeros"


def constant_around(inner: Geometry, outer: Geometry) -> bool:
    """Whether ``inner``, its input continued by zeros, is constant wherever ``outer`` reads beyond its output."""
    return all(
        (before <= 0 or constant_before(own, stride, outer_taps, step))
        and (after <= 0 or constant_after(own, slacks[-1]))
        for own, stride, slacks, outer_taps, step, (before, after) in zip(
            inner.taps, inner.stride, inner.equal_slacks, outer.taps, outer.stride, outer.padding, strict=True
        )
    )


def constant_before(inner: range, stride: int, outer: range, step: int) -> bool:
    """Whether the inner map is constant at every position r < 0 that ``outer``, of stride ``step``, reads.

    Outer tap u reads r = step * q + u with q >= 0; the last such r < 0 is ``u mod step - step``. All inner taps there
    are before the input exactly where ``stride * r + last tap < 0``.
    """
    return all(stride * (u % step - step) + inner[-1] < 0 for u in outer if u < 0)


def constant_after(inner: range, slack: int) -> bool:
    """Whether the inner map, continued beyond its m output positions, is constant from position m on.

    With n inputs, m = floor((n + slack) / stride) + 1, so ``stride * m >= n + slack + 1``, with equality for one n in
    each ``stride``. All taps at m are after the input, ``stride * m + first tap >= n``, for every n exactly where
    ``slack + 1 + first tap >= 0``. Whatever the stride of an outer map that pads here, it reads m for some n. Where not
    every size fits, it is the largest of the equal slacks that some n reaches.
    """
    return slack + 1 + inner[0] >= 0


# One spatial axis of a map: its taps, evenly spaced offsets, and what becomes of the taps of two maps.


def spread(offsets: Iterable[int]) -> range:
    """Return the smallest evenly spaced set that holds these offsets; a single one has spacing 1."""
    found = sorted(set(offsets))
    step = math.gcd(*(offset - found[0] for offset in found)) or 1
    return range(found[0], found[-1] + 1, step)


def composed(inner: range, stride: int, outer: range) -> range:
    """Return the taps of ``outer`` after ``inner``, which has this stride.

    Position r of the inner output reads ``stride * r + t``, and position q of the outer one reads r = q * step + u: it
    reads ``t + stride * u`` beyond ``stride * step * q``.
    """
    return spread(t + stride * u for t in inner for u in outer)


def window(own: range, among: range) -> slice:
    """Return where the taps ``own`` are in ``among``, which holds them all."""
    return slice(
        (own[0] - among[0]) // among.step,
        (own[-1] - among[0]) // among.step + 1,
        max(own.step // among.step, 1),
    )


Ints = tuple[int, ...]
Padding = tuple[tuple[int, int], ...]

# Sizes that a map does not take: an operator before a convolution refuses sizes that a convolution would take.


@dataclass(frozen=True)
class Fit:
    """Which sizes n fit along an axis: those with ``(n + offset) % modulus < width``."""

    offset: int
    modulus: int
    width: int = 1

    def takes(self, size: int) -> bool:
        """Whether a size fits."""
        return (size + self.offset) % self.modulus < self.width

    def describe(self) -> str:
        """Return the sizes that fit in words."""
        taken = [n for n in range(self.modulus) if self.takes(n)]
        if taken == [0]:
            return f"a size that is a multiple of {self.modulus}"
        return f"a size that leaves {' or '.join(map(str, taken))} divided by {self.modulus}"

    def behind(self, stride: int, slack: int) -> Fit:
        """Return which sizes n fit that a map of this stride and slack makes to ones that do.

        It makes them ``m = floor((n + slack) / stride) + 1``, and ``floor(u / s) mod k < w`` where
        ``u mod (s k) < s w``.
        """
        return Fit(slack + stride * (1 + self.offset), stride * self.modulus, stride * self.width)


Fits = frozenset[Fit]


def _all_take(fits: Fits, size: int) -> bool:
    return all(fit.takes(size) for fit in fits)


def agreeing(stride: int, one: int, other: int) -> Fits:
    """Return which sizes fit, where maps of these slacks are to have outputs of one size; nothing where none does.

    ``floor((n + a) / s) = floor((n + b) / s)`` for a <= b where ``(n + a) mod s + b - a < s``.
    """
    width = stride - abs(one - other)
    return frozenset({Fit(min(one, other), stride, width)} if width > 0 else ())


@cache
def equal_slacks(stride: int, slack: int, fits: Fits) -> range:
    """Return the slacks for which the output is as large as for this one, at every size that fits.

    Raises NotAffine where no size fits.
    """
    sizes = range(math.lcm(stride, *(fit.modulus for fit in fits)))
    starts = [stride * ((n + slack) // stride) - n for n in sizes if _all_take(fits, n)]
    if not starts:
        raise NotAffine("size-mismatch", "no size of the input fits all of it")
    return range(max(starts), min(starts) + stride)


class NotAffine(Exception):
    """Two maps cannot be one. ``code`` is a key of ``repfuse.explanations.REFUSALS``."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(frozen=True)
class Geometry:
    """Geometry of ``y = W ⋆ x + b`` with W of shape ``[out_channels, in_channels / groups, *kernel]``.

    ``padding`` is (before, after) per axis, negative where it crops; ``padding_mode`` is that of ``torch.nn.Conv2d``.
    Without spatial axes, kernel ``()``, it is a linear layer, and the channels are the last axis of its tensors.
    ``fits`` says per axis which sizes the map takes, () that it takes all.
    """

    in_channels: int
    out_channels: int
    kernel: Ints
    stride: Ints
    padding: Padding
    dilation: Ints
    groups: int = 1
    padding_mode: str = "zeros"
    fits: tuple[Fits, ...] = ()

    @staticmethod
    @cache
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
        """Shape of the weight in this algebra, ``[out_channels, in_channels / groups, *kernel]``."""
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
    def equal_slacks(self) -> tuple[range, ...]:
        """The slacks that give the output the size that it has, at all sizes that fit, per axis."""
        return tuple(map(equal_slacks, self.stride, self.slack, self._fits))

    @property
    def _fits(self) -> tuple[Fits, ...]:
        return self.fits or (frozenset(),) * self.ndim

    @property
    def plainest(self) -> Geometry:
        """The same map, at all sizes that fit, with padding that is as even as can be before and after the input."""
        if not self.fits:
            return self
        axes = zip(self.padding, self.slack, self.equal_slacks, strict=True)
        even = tuple(
            (before, after + min(max(slack + before - after, slacks[0]), slacks[-1]) - slack)
            for (before, after), slack, slacks in axes
        )
        return replace(self, padding=even)

    @property
    def pads(self) -> bool:
        """Whether the map reads outside its input."""
        return any(before > 0 or after > 0 for before, after in self.padding)

    @property
    def keeps_edges(self) -> bool:
        """Whether the map neither pads nor crops."""
        return not any(before or after for before, after in self.padding)

    @property
    def is_pointwise(self) -> bool:
        """Whether the map is one matrix for the channels of every pixel: a 1x1, or a linear layer."""
        return (
            type(self) is Geometry and self.groups == 1 and self.keeps_edges and set(self.kernel + self.stride) <= {1}
        )

    @property
    def pad_then_crop(self) -> tuple[Ints, Ints]:
        """The amounts to pad and then to crop by, as ``F.pad`` takes them: from the last axis to the first.

        In this order, since a crop may take more from one end than there is without the padding at the other.
        """
        flat = [amount for pair in reversed(self.padding) for amount in pair]
        return tuple(max(amount, 0) for amount in flat), tuple(min(amount, 0) for amount in flat)

    @property
    def depthwise(self) -> bool:
        """Whether each output channel reads the one input channel of its own number."""
        return self.groups == self.in_channels == self.out_channels

    def output_size(self, size: Ints) -> Ints:
        """Spatial size of the output for an input of spatial size ``size``; not positive where there is none."""
        return tuple((n + a) // s + 1 for n, a, s in zip(size, self.slack, self.stride, strict=True))

    @property
    def smallest_input(self) -> Ints:
        """The smallest input size, at least 1, that has an output."""
        return tuple(max(1, -a) for a in self.slack)

    def next_fitting(self, size: Ints) -> Ints:
        """Return the next size, from this one on along each axis, that fits."""
        axes = zip(size, self._fits, strict=True)
        return tuple(next(n for n in itertools.count(start) if _all_take(fits, n)) for start, fits in axes)

    def macs(self, source: Ints, output: Ints) -> int:  # noqa: ARG002
        """Multiply-accumulates from shape ``source`` to shape ``output``, batch and channels included."""
        return math.prod(output) * math.prod(self.weight_shape[1:])

    def alike(self, other: Geometry) -> tuple[Geometry, Geometry]:
        """Return both as maps of one kind: where one of them is transposed, it says how. Raises NotAffine."""
        if type(other) is Geometry:
            return self, other
        theirs, own = other.alike(self)
        return own, theirs

    def add(self, other: Geometry) -> Geometry:
        """Geometry of the sum of two maps of one source: the union of the taps, the gcd of the groups.

        Exact where the strides agree and, for every input size n that fits both, ``floor((n + a) / s) =
        floor((n + b) / s)``: where all sizes do, that is a = b. Raises NotAffine where it is not.
        """
        if (self.ndim, self.in_channels, self.out_channels) != (other.ndim, other.in_channels, other.out_channels):
            raise NotAffine("channel-mismatch", f"{self.ends} beside {other.ends}")
        one, other = self._beside(other)
        if one == other:
            return one
        axes = [spread((*mine, *its)) for mine, its in zip(one.taps, other.taps, strict=True)]
        return replace(one._on(axes, one.slack), groups=math.gcd(one.groups, other.groups))

    def then(self, outer: Geometry) -> Geometry:
        """Geometry of ``x -> outer(self(x))``.

        With strides s and t, slacks a and b, n inputs give ``m = floor((n + a) / s) + 1`` and then
        ``floor((m + b) / t) + 1 = floor((n + a + s (b + 1)) / (s t)) + 1`` outputs, since ``floor(floor(u / s) / t) =
        floor(u / (s t))``: the slack is ``a + s (b + 1)``, for every n for which the inner map has an output. The
        taps are those of ``taps.composed``. A group of the composition holds whole groups of both, so their gcd is
        right; ``channels.Windows`` may find more.

        Exact where ``outer`` reads nothing beyond the output of ``self`` or meets a constant there; see
        ``borders_show`` for which. Raises NotAffine: "channel-mismatch", "padding-mode", "padding-between".
        """
        if (self.ndim, self.out_channels) != (outer.ndim, outer.in_channels):
            raise NotAffine("channel-mismatch", f"{self.ends} before {outer.ends}")
        inner, outer = self.alike(outer)
        return inner._then(outer)

    def _then(self, outer: Geometry) -> Geometry:
        """Return the geometry of ``then``, of two maps of one kind."""
        mode = common_mode(self, outer)
        if mode is None:
            raise NotAffine("padding-mode", f"{outer.describe()} after {self.describe()}")
        if mode == "zeros" and not constant_around(self, outer):
            reason = f"{outer.describe()} pads the output of {self.describe()}, which reads the input beyond it too"
            raise NotAffine("padding-between", reason)
        axes = [composed(*axis) for axis in zip(self.taps, self.stride, outer.taps, strict=True)]
        slack = tuple(a + s * (b + 1) for a, s, b in zip(self.slack, self.stride, outer.slack, strict=True))
        return replace(
            self._on(axes, slack),
            out_channels=outer.out_channels,
            stride=tuple(s * t for s, t in zip(self.stride, outer.stride, strict=True)),
            groups=math.gcd(self.groups, outer.groups),
            padding_mode=mode,
            fits=self._fits_before(outer),
        )

    def _fits_before(self, outer: Geometry) -> tuple[Fits, ...]:
        """Return the sizes that fit this map and, by what it makes of them, ``outer``."""
        if not outer.fits:
            return self.fits
        axes = zip(self._fits, outer.fits, self.stride, self.slack, strict=True)
        return tuple(own | {fit.behind(s, a) for fit in theirs} for own, theirs, s, a in axes)

    def borders_show(self, outer: Geometry) -> bool:
        """Whether ``outer`` pads the output of ``self`` with numbers of its own.

        Where ``then`` allows it, ``self`` is its bias out there; so the bias has to be what ``outer`` pads with.
        """
        _, outer = self.alike(outer)
        return outer.padding_mode == "zeros" and outer.pads

    def behind(self, offsets: Ints, outer: Geometry) -> tuple[range, ...]:  # noqa: ARG002
        """Return the taps of ``self`` as those of the composition, behind the one tap ``offsets`` of ``outer``."""
        by = (stride * u for stride, u in zip(self.stride, offsets, strict=True))
        return tuple(range(t.start + b, t.stop + b, t.step) for t, b in zip(self.taps, by, strict=True))

    def select(self, indices: Sequence[int]) -> Geometry:
        """Geometry of the output channels ``indices``, in that order; without groups, which are not in order then."""
        return replace(self, out_channels=len(indices), groups=1)

    @staticmethod
    def stacked(parts: Sequence[Geometry]) -> Geometry:
        """Geometry of the output channels of all parts, one after the other; without groups.

        Sizes for which the outputs would not be of one size do not fit: what joins them refuses these. Raises NotAffine
        where strides, sizes or padding modes do not allow it, as ``add`` does.
        """
        first, *rest = parts
        for part in rest:
            if (first.ndim, first.in_channels) != (part.ndim, part.in_channels):
                raise NotAffine("channel-mismatch", f"{first.ends} beside {part.ends}")
            first, _ = first._beside(part, joined=True)
        parts = [part.alike(first)[0] for part in parts]
        axes = [spread(tap for part in axis for tap in part) for axis in zip(*(p.taps for p in parts), strict=True)]
        return replace(first._on(axes, first.slack), out_channels=sum(part.out_channels for part in parts), groups=1)

    def _on(self, axes: Sequence[range], slack: Ints) -> Geometry:
        """Return this geometry with other taps and slack."""
        return replace(
            self,
            kernel=tuple(len(axis) for axis in axes),
            padding=tuple((-axis[0], a + 1 + axis[-1]) for axis, a in zip(axes, slack, strict=True)),
            dilation=tuple(axis.step for axis in axes),
        )

    def _beside(self, other: Geometry, *, joined: bool = False) -> tuple[Geometry, Geometry]:
        """Return both as maps of one kind, which may be added, or ``joined``: the first takes what fits both.

        Raises NotAffine where they may not.
        """
        one, two = self.alike(other)
        if one.stride != two.stride:
            raise NotAffine("stride-mismatch", f"stride {one.stride} beside stride {two.stride}")
        fits = one._fits_beside(two, joined=joined)
        one = one if fits == one.fits else replace(one, fits=fits)
        if not all(map(operator.contains, one.equal_slacks, two.slack)):
            raise NotAffine(
                "size-mismatch",
                f"{self.describe()} beside {other.describe()}: equal output sizes for some input sizes at most",
            )
        for mode in (one.padding_mode, two.padding_mode):
            if mode != "zeros":
                raise NotAffine("padding-mode", f"padding_mode={mode!r} in a sum")
        return one, two

    def _fits_beside(self, other: Geometry, *, joined: bool) -> tuple[Fits, ...]:
        """Return the sizes that fit both; where they are ``joined``, those alone at which the outputs are of one."""
        fits = [one | two for one, two in zip(self._fits, other._fits, strict=True)]
        if joined:
            axes = zip(fits, self.stride, self.slack, other.slack, strict=True)
            fits = [f if b in equal_slacks(s, a, f) else f | agreeing(s, a, b) for f, s, a, b in axes]
        return tuple(fits) if any(fits) else ()

    @property
    def ends(self) -> str:
        """Channels in and out, for messages."""
        return f"{self.in_channels}->{self.out_channels} channels"

    def describe(self) -> str:
        """Return a short name for people, such as ``3x3 stride 2 groups 4``."""
        parts = ["x".join(map(str, self.kernel)) or "linear"]
        if any(s != 1 for s in self.stride):
            parts.append(f"stride {_one_or_all(self.stride)}")
        if any(d != 1 for d in self.dilation):
            parts.append(f"dilation {_one_or_all(self.dilation)}")
        if self.depthwise and self.groups > 1:
            parts.append("depthwise")
        elif self.groups > 1:
            parts.append(f"groups {self.groups}")
        if any(amount < 0 for pair in self.padding for amount in pair):
            parts.append("crop")
        if self.padding_mode != "zeros":
            parts.append(self.padding_mode)
        return " ".join(parts)


def _one_or_all(values: Ints) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))
