"""A second opinion on each site, which shares no code with the algebra: see ``repfuse.probing``.

The original's own operations are probed as a black box in float64, and what they answer is held against the settings of
the fused modules and their weights before rounding; the stored weights have to be these, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from repfuse.networks import device_of, same_randomness
from repfuse.plans import Plan
from repfuse.probing import Box, Kernel, Refused, kernel_of
from repfuse.probing.comparing import DRAWS, Opinion, Size, compare, shows, sizes_for
from repfuse.probing.reading import scaling
from repfuse.proof.exact import ExactWeights, Weight, convolution_at
from repfuse.proof.opinions import EXHAUSTIVE, SecondOpinion, SiteProbe
from repfuse.proof.places import Place, places
from repfuse.proof.weights import compared_weights
from repfuse.verifying.copies import copy_with, in_float64
from repfuse.verifying.widening import Widening

TOLERANCE = 1e-12
"""Relative error that separates a wrong kernel (a weight that is off by 1e-6 shows as 1e-9) from rounding (1e-15)."""

Shape = tuple[int, ...]


def second_opinion(
    original: nn.Module, plan: Plan, fused: nn.Module, progress: Callable[[float], None] = lambda _: None
) -> SecondOpinion:
    """Probe each site of ``plan`` in ``original`` and hold it against the modules of ``fused``.

    A place that cannot be probed does not pass. ``progress`` is told the fraction that is done. Raises RepfuseError
    where the plan does not fit.
    """
    found, sites = list(places(original, plan)), []
    exact = ExactWeights(fused, found)
    with same_randomness(original):
        for place in found:
            sites.append(_probed(place, fused, exact))
            progress(len(sites) / len(found))
    return SecondOpinion(tuple(sites), TOLERANCE)


def _probed(place: Place, fused: nn.Module, exact: ExactWeights) -> SiteProbe:
    try:
        opinions = list(_opinions(place, fused, exact))
    except Refused as refused:
        return SiteProbe(place.path, None, "", (), f"It could not be probed: {refused}.")
    worst = max(opinions, key=lambda opinion: opinion.error)
    least = min(opinions, key=lambda opinion: opinion.channels / opinion.of)
    sizes = tuple(dict.fromkeys(size for opinion in opinions for size in opinion.sizes))
    return SiteProbe(place.path, worst.error, _method(least), sizes, _failure(worst, exact.at(place), fused))


def _method(opinion: Opinion) -> str:
    if opinion.exhaustive:
        return EXHAUSTIVE
    return f"sketched, {DRAWS} draws, and {opinion.channels} of {opinion.of} channels exhaustively"


def _failure(worst: Opinion, weights: Sequence[Weight], fused: nn.Module) -> str:
    """Return why a site does not pass; "" where it does."""
    if not worst.error <= TOLERANCE:
        return f"Its kernel is not that of the original's operations: a relative error of {worst.error:.1e}."
    return next((weight.reason for weight in compared_weights(weights, fused) if not weight.passed), "")


def _opinions(place: Place, fused: nn.Module, exact: ExactWeights) -> Iterator[Opinion]:
    """Yield the opinion on each source, with the others at zero; their biases add up, so each is asked for all."""
    inputs = _Inputs(place, fused)
    kernels = [inputs.kernels(index, exact) for index in range(len(inputs.shapes))]
    for index, own in enumerate(kernels):
        others = [kernel for number, others in enumerate(kernels) if number != index for kernel in others]
        bias = torch.stack([own[0].bias, *(kernel.bias for kernel in others)]).sum(0)
        yield _asked(inputs, index, [replace(own[0], bias=bias), *own[1:]])


def _asked(inputs: _Inputs, index: int, kernels: Sequence[Kernel]) -> Opinion:
    """Compare at small sizes, or at the example's where the operations take no others."""
    box = inputs.box(index, free=True)
    sizes = [size for size in sizes_for(kernels) if box.runs(size)]
    if not sizes or not shows(kernels, sizes[0]):
        box, sizes = inputs.box(index, free=False), [inputs.size(index)]
    if not shows(kernels, sizes[0]):
        raise Refused("no input that it takes shows every tap of the kernel")
    return compare(box, kernels, sizes)


@dataclass
class _Inputs:
    """The sources of a place as tensors ``[N, C, *size]``, whatever they are in the graph.

    A linear layer has its channels last, and a source may have no batch axis.
    """

    place: Place
    fused: nn.Module

    def __post_init__(self) -> None:
        layer = convolution_at(self.fused, self.place.path)
        self.before = copy_with(self.place.before(), in_float64)
        self.shapes: list[Shape] = [self.place.planner.traced.shape_of[source] for source in self.place.sources]
        self.last = isinstance(layer, nn.Linear)
        rank = len(self.shapes[0])
        self.ndim = max(0, rank - 2) if self.last else layer.get_parameter("weight").dim() - 2
        self.batched = rank == self.ndim + 2

    def kernels(self, index: int, exact: ExactWeights) -> list[Kernel]:
        """Return what the fused network has in the place of the groups of one source."""
        place, found = self.place, []
        for group in place.region.groups:
            if group.source is not place.sources[index]:
                continue
            path = place.path_of.get(id(group))
            if path is not None:
                module = self.fused.get_submodule(path)
                found.append(kernel_of(copy_with(module, exact.change(module)), self.ndim))
            elif group.of_source is not None:
                found.append(scaling(group.of_source, self.channels(index), self.ndim))
            else:
                raise Refused("a part of it is no layer")
        return found

    def channels(self, index: int) -> int:
        """Return the channels of a source."""
        shape = self.shapes[index]
        return shape[-1] if self.last else shape[len(shape) - self.ndim - 1]

    def size(self, index: int) -> Size:
        """Return the spatial size of a source at the example."""
        shape = self.shapes[index]
        return shape[self.batched : len(shape) - 1] if self.last else shape[len(shape) - self.ndim :]

    def box(self, index: int, *, free: bool) -> Box:
        """Return the operations as a function of one source; the others are zero.

        Where it is ``free`` they follow its size and batch, else all have those of the example.
        """
        batch = None if free or not self.batched else self.shapes[index][0]

        def run(x: Tensor) -> Tensor:
            sizes = [tuple(x.shape[2:]) if free else self.size(number) for number in range(len(self.shapes))]
            inputs = [x.new_zeros((len(x), self.channels(number), *size)) for number, size in enumerate(sizes)]
            inputs[index] = x
            return self._call(inputs)

        return Box(run, self.channels(index), self.ndim, batch)

    def _call(self, inputs: list[Tensor]) -> Tensor:
        """Call the operations on inputs that are laid out as in the graph; they may write into these."""
        device = device_of(self.before)
        given = [(x.movedim(1, -1) if self.last else x).to(device, copy=True) for x in inputs]
        with Widening(tuple(given), (), in_float64):
            if self.batched:
                y: Tensor = self.before(*given)
            else:
                y = torch.stack([self.before(*sample) for sample in zip(*given, strict=True)])
        return y.movedim(-1, 1) if self.last else y
