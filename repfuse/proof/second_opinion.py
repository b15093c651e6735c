"""A second opinion on each site, which shares no code with the algebra: see ``repfuse.probing``.

The original's own operations are probed as a black box, and what they answer is held against the tensors and settings
that stand in the fused modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repfuse.networks import device_of, same_randomness
from repfuse.plans import Plan
from repfuse.probing import Box, Kernel, Refused, kernel_of
from repfuse.probing.comparing import Opinion, Size, compare, shows, sizes_for
from repfuse.probing.reading import scaling
from repfuse.proof.opinions import SecondOpinion, SiteProbe
from repfuse.proof.places import Place, places
from repfuse.verifying.copies import copy_with, in_float64
from repfuse.verifying.widening import Widening

TOLERANCE = 1e-12
"""Relative error that separates a wrong kernel (a weight that is off by 1e-6 shows as 1e-9) from rounding (1e-15)."""

Shape = tuple[int, ...]


def second_opinion(
    original: nn.Module, plan: Plan, fused: nn.Module, progress: Callable[[float], None] = lambda _: None
) -> SecondOpinion:
    """Probe each site of ``plan`` in ``original`` and hold it against the modules of ``fused``.

    Weights that are stored in a narrower dtype than float64 may be off by half their spacing. A place that cannot be
    probed does not pass. ``progress`` is told the fraction that is done. Raises RepfuseError where the plan does not
    fit.
    """
    sites = []
    with same_randomness(original):
        for place in places(original, plan):
            sites.append(_probed(place, fused))
            progress(len(sites) / len(plan.sites))
    return SecondOpinion(tuple(sites))


def _probed(place: Place, fused: nn.Module) -> SiteProbe:
    try:
        opinions = list(_opinions(place, fused))
    except Refused as refused:
        return SiteProbe(place.path, None, "", (), f"It could not be probed: {refused}.")
    worst = max(opinions, key=lambda opinion: opinion.error)
    least = min(opinions, key=lambda opinion: opinion.channels / opinion.of)
    sizes = tuple(dict.fromkeys(size for opinion in opinions for size in opinion.sizes))
    failed = f"Its kernel is not that of the original's operations: a relative error of {worst.error:.1e}."
    return SiteProbe(place.path, worst.error, least.method, sizes, "" if worst.error <= TOLERANCE else failed)


def _opinions(place: Place, fused: nn.Module) -> Iterator[Opinion]:
    """Yield the opinion on each source, with the others at zero; their biases add up, so each is asked for all."""
    inputs = _Inputs(place)
    kernels = [inputs.kernels(index, fused) for index in range(len(inputs.shapes))]
    for index, own in enumerate(kernels):
        others = [kernel for number, others in enumerate(kernels) if number != index for kernel in others]
        constants = [constant for kernel in others for constant in _constants(kernel, own[0])]
        yield _asked(inputs, index, [*own, *constants])


def _constants(kernel: Kernel, like: Kernel) -> list[Kernel]:
    """Return the bias of another source's kernel, as one of weight zero of this source."""
    if not bool(kernel.bias.any()):
        return []
    nothing = torch.zeros_like(like.weight)
    return [Kernel(nothing, kernel.bias, like.axes, like.groups, nothing, kernel.half_spacing_of_bias)]


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

    def __post_init__(self) -> None:
        region = self.place.region
        self.before = copy_with(self.place.before(), in_float64)
        self.shapes: list[Shape] = [self.place.planner.traced.shape_of[source] for source in self.place.sources]
        self.last = not region.groups[0].expression.geometry.ndim
        rank = len(self.shapes[0])
        self.ndim = max(0, rank - 2) if self.last else region.groups[0].expression.geometry.ndim
        self.batched = rank == self.ndim + 2

    def kernels(self, index: int, fused: nn.Module) -> list[Kernel]:
        """Return what the fused network has in the place of the groups of one source."""
        place, found = self.place, []
        for group in place.region.groups:
            if group.source is not place.sources[index]:
                continue
            path = place.path_of.get(id(group))
            if path is not None:
                found.append(kernel_of(fused.get_submodule(path), self.ndim))
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
        """Call the operations on inputs that are laid out as in the graph."""
        device = device_of(self.before)
        given = [(x.movedim(1, -1) if self.last else x).to(device) for x in inputs]
        with Widening(tuple(given)):
            if self.batched:
                y: Tensor = self.before(*given)
            else:
                y = torch.stack([self.before(*sample) for sample in zip(*given, strict=True)])
        return y.movedim(-1, 1) if self.last else y
