"""The kinds of input, each for the mistakes that it brings out.

- ``noise``: every weight takes part, so a wrong one shows, however diluted by the others.
- ``large``: wakes units that biases keep silent, and brings weights out against biases.
- ``nearly constant``: far from the border all is even, so wrong padding values and wrong sums of a kernel stand out.
- ``impulses``: single pixels show a kernel tap by tap: one that is shifted, or lost its dilation; one pixel for each
  phase of a stride of two, for a stride that starts elsewhere; in the corners, for a crop or padding at one end alone.
- ``frame``: only the border is not zero, so what is wrong there is not diluted by the interior.
- ``natural``: large even areas, edges, channels alike: what cancels in noise adds up, as it does in real use.

Nothing is exactly zero or constant. On exact zeros and constants, kernels whose weights sum to 0 leave nothing but
rounding, to which every error is relative, and scores tie, so that the rounding decides which comes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import reduce
from operator import or_

import torch

from repfuse.checking.inputs.trial import Sizes

# Images like photographs: neighbouring pixels and channels are alike, and there are edges.
#
# The power spectrum of natural images falls with the square of the frequency, so the amplitude falls as 1/f. Colour
# channels share most of their brightness. Objects hide each other, which makes edges.


SHARED = 0.9  # part of a pixel's standard deviation that all channels have in common
DARKEST, BRIGHTEST = -2.1, 2.6  # black and white after the normalisation by the statistics of ImageNet


def natural(shape: Sizes, axes: Sizes, generator: torch.Generator) -> torch.Tensor:
    """Return images in float64, in the range that normalised photographs have; ``axes`` are the spatial ones."""
    common = tuple(n if axis in (0, *axes) else 1 for axis, n in enumerate(shape))
    shared, own = _scene(common, axes, generator), _scene(shape, axes, generator)
    return (SHARED * shared + math.sqrt(1 - SHARED**2) * own).clamp(DARKEST, BRIGHTEST)


def _scene(shape: Sizes, axes: Sizes, generator: torch.Generator) -> torch.Tensor:
    """Return a background with an object before it, of mean 0 and standard deviation 1 per image."""
    back, front = (_clouds(shape, axes, generator) for _ in range(2))
    brighter = torch.randn([1 if axis in axes else n for axis, n in enumerate(shape)], generator=generator).double()
    return _standardised(torch.where(_object(shape, axes), front + 2 * brighter, back), axes)


def _clouds(shape: Sizes, axes: Sizes, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    squares = torch.zeros([1] * len(shape), dtype=torch.float64)
    for axis in axes:
        along = [-1 if other == axis else 1 for other in range(len(shape))]
        squares = squares + torch.fft.fftfreq(shape[axis], dtype=torch.float64).square().reshape(along)
    slowest = 1 / max(shape[axis] for axis in axes)
    spectrum = torch.fft.fftn(noise, dim=axes) / squares.sqrt().clamp_min(slowest)
    return _standardised(torch.fft.ifftn(spectrum, dim=axes).real, axes)


def _object(shape: Sizes, axes: Sizes) -> torch.Tensor:
    """Return where a box lies that is off the centre and reaches no border."""
    inside = torch.ones([1] * len(shape), dtype=torch.bool)
    for axis in axes:
        n = shape[axis]
        along = [-1 if other == axis else 1 for other in range(len(shape))]
        position = torch.arange(n)
        inside = inside & ((position > n // 5) & (position <= n // 5 + n // 2)).reshape(along)
    return inside


def _standardised(x: torch.Tensor, axes: Sizes) -> torch.Tensor:
    x = x - x.mean(dim=axes, keepdim=True)
    return x / x.square().mean(dim=axes, keepdim=True).sqrt().clamp_min(1e-9)


LARGE = 10  # times the usual inputs
FAINT = 1 / 64  # times the usual inputs: what lies where a kind has nothing to show

Kind = Callable[[Sizes, Sizes, torch.Generator], torch.Tensor]
"""Makes a tensor of a shape, whose spatial axes are given, in float64."""


def noise(shape: Sizes, _axes: Sizes, generator: torch.Generator) -> torch.Tensor:
    """Return standard normal numbers."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def large(shape: Sizes, axes: Sizes, generator: torch.Generator) -> torch.Tensor:
    """Return noise that is LARGE times larger."""
    return LARGE * noise(shape, axes, generator)


def nearly_constant(shape: Sizes, axes: Sizes, generator: torch.Generator) -> torch.Tensor:
    """Return a level per sample and channel, between 1/2 and 3/2 and of either sign, and faint noise."""
    levels = noise(tuple(1 if axis in axes else n for axis, n in enumerate(shape)), axes, generator)
    return levels.sign() * (0.5 + levels.abs().frac()) + FAINT * noise(shape, axes, generator)


def impulses(shape: Sizes, axes: Sizes, generator: torch.Generator) -> torch.Tensor:
    """Return large numbers at the pixels of a grid, four along each axis, and faint noise between them."""
    here = torch.ones([1] * len(shape), dtype=torch.bool)
    for axis in axes:
        here = here & _along(shape, axis, _apart(shape[axis]))
    return torch.where(here, LARGE, FAINT) * noise(shape, axes, generator)


def frame(shape: Sizes, axes: Sizes, generator: torch.Generator) -> torch.Tensor:
    """Return noise in the outermost pixels, and faint noise within."""
    outermost = reduce(or_, (_along(shape, axis, (0, shape[axis] - 1)) for axis in axes))
    return torch.where(outermost, 1, FAINT) * noise(shape, axes, generator)


def _apart(n: int) -> Sizes:
    """Return both ends, and between them an odd and an even position, as far apart as they fit."""
    first, second = n // 3, 2 * n // 3
    return (0, first, second + (second - first + 1) % 2, n - 1)


def _along(shape: Sizes, axis: int, positions: Iterable[int]) -> torch.Tensor:
    """Return where the index along ``axis`` is one of these, to be broadcast."""
    index = torch.arange(shape[axis])
    found = reduce(or_, (index == position for position in positions))
    return found.reshape([-1 if other == axis else 1 for other in range(len(shape))])


KINDS: dict[str, Kind] = {
    "large": large,
    "nearly constant": nearly_constant,
    "impulses": impulses,
    "frame": frame,
    "natural": natural,
}
OF_FEATURES = ("large", "impulses")
"""The kinds that make sense of plain features, ``[batch, features]``."""
