"""Inputs for one site: small enough that every output lies at a border."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from repfuse.algebra.geometry import Geometry, Ints
from repfuse.ops.meaning import Passage, Selected
from repfuse.proof.places import Place
from repfuse.verifying import Trial


def site_trials(place: Place) -> Iterator[Trial]:
    """Yield inputs from one pixel to just beyond the kernel's reach, even and odd, not all square, one nearly constant.

    Of a constant, kernels whose weights sum to 0 (standardised ones, a Laplacian) would leave nothing but rounding.
    """
    sources, example = place.sources, place.planner.recording.shape_of[place.sources[0]]
    if len(sources) > 1 or _has_fixed_sizes(place):  # their sizes depend on each other: the example's fit
        yield at_the_example(place)
    if len(sources) > 1:
        return
    for number, shape in enumerate(_shapes(example, place.region.groups[0].expression.geometry)):
        label = f"input {'x'.join(map(str, shape))}"
        yield Trial(label, (_random(shape, number),))
        if number == 0:
            yield Trial(f"{label}, nearly constant", (1 + _random(shape, number) / 4,))


def at_the_example(place: Place) -> Trial:
    """Return random inputs of the sizes that the sources have for the network's example."""
    shapes = [place.planner.recording.shape_of[source] for source in place.sources]
    return Trial("the example's size", tuple(_random(shape, seed) for seed, shape in enumerate(shapes)))


def _has_fixed_sizes(place: Place) -> bool:
    """Whether an operation of the region may hold sizes as numbers, so that no other size runs."""
    return any(isinstance(place.planner.meanings[node], Selected | Passage) for node in place.region.nodes)


def _shapes(example: Ints, geometry: Geometry) -> Iterator[Ints]:
    """Yield shapes of the source: of a linear layer with other leading axes, of a convolution with other sizes."""
    if not geometry.ndim:
        for number in range(4):
            yield (*(1 + (number + axis) % 3 for axis in range(len(example) - 1)), geometry.in_channels)
        return
    for number, size in enumerate(_sizes(geometry)):
        batch = (1 + number % 2,) if len(example) == geometry.ndim + 2 else ()
        yield (*batch, geometry.in_channels, *size)


def _sizes(geometry: Geometry) -> list[Ints]:
    """Return input sizes counted from the smallest that has an output."""
    least = geometry.smallest_input
    reach = max(taps[-1] - taps[0] + 1 for taps in geometry.taps)
    steps = [[1, 2], [0, 0], [2, 0], [reach, reach + 1]]
    return [tuple(low + step[axis % 2] for axis, low in enumerate(least)) for step in steps]


def _random(shape: Ints, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
