"""Images like photographs: neighbouring pixels and channels are alike, and there are edges.

The power spectrum of natural images falls with the square of the frequency, so the amplitude falls as 1/f. Colour
channels share most of their brightness. Objects hide each other, which makes edges.
"""

from __future__ import annotations

import math

import torch

from repfuse.verifying.inputs.trial import Shape

SHARED = 0.9  # part of a pixel's standard deviation that all channels have in common
DARKEST, BRIGHTEST = -2.1, 2.6  # black and white after the normalisation by the statistics of ImageNet


def natural(shape: Shape, axes: Shape, generator: torch.Generator) -> torch.Tensor:
    """Return images in float64, in the range that normalised photographs have; ``axes`` are the spatial ones."""
    common = tuple(n if axis in (0, *axes) else 1 for axis, n in enumerate(shape))
    shared, own = _scene(common, axes, generator), _scene(shape, axes, generator)
    return (SHARED * shared + math.sqrt(1 - SHARED**2) * own).clamp(DARKEST, BRIGHTEST)


def _scene(shape: Shape, axes: Shape, generator: torch.Generator) -> torch.Tensor:
    """Return a background with an object before it, of mean 0 and standard deviation 1 per image."""
    back, front = (_clouds(shape, axes, generator) for _ in range(2))
    brighter = torch.randn([1 if axis in axes else n for axis, n in enumerate(shape)], generator=generator).double()
    return _standardised(torch.where(_object(shape, axes), front + 2 * brighter, back), axes)


def _clouds(shape: Shape, axes: Shape, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    squares = torch.zeros([1] * len(shape), dtype=torch.float64)
    for axis in axes:
        along = [-1 if other == axis else 1 for other in range(len(shape))]
        squares = squares + torch.fft.fftfreq(shape[axis], dtype=torch.float64).square().reshape(along)
    slowest = 1 / max(shape[axis] for axis in axes)
    spectrum = torch.fft.fftn(noise, dim=axes) / squares.sqrt().clamp_min(slowest)
    return _standardised(torch.fft.ifftn(spectrum, dim=axes).real, axes)


def _object(shape: Shape, axes: Shape) -> torch.Tensor:
    """Return where a box lies that is off the centre and reaches no border."""
    inside = torch.ones([1] * len(shape), dtype=torch.bool)
    for axis in axes:
        n = shape[axis]
        along = [-1 if other == axis else 1 for other in range(len(shape))]
        position = torch.arange(n)
        inside = inside & ((position > n // 5) & (position <= n // 5 + n // 2)).reshape(along)
    return inside


def _standardised(x: torch.Tensor, axes: Shape) -> torch.Tensor:
    x = x - x.mean(dim=axes, keepdim=True)
    return x / x.square().mean(dim=axes, keepdim=True).sqrt().clamp_min(1e-9)
