"""A place as functions of one tensor ``[N, C, *size]``, which is how it is probed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repfuse.networks import device_of
from repfuse.probing import Box, Kernel, Refused, kernel_of
from repfuse.probing.comparing import Size
from repfuse.probing.reading import scaling
from repfuse.proof.exact import ExactWeights, convolution_at
from repfuse.proof.places import Place
from repfuse.verifying.copies import copy_with, in_float64
from repfuse.verifying.widening import Widening

Shape = tuple[int, ...]


@dataclass
class PlaceInputs:
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
        with Widening(tuple(given), {}, in_float64):
            if self.batched:
                y: Tensor = self.before(*given)
            else:
                y = torch.stack([self.before(*sample) for sample in zip(*given, strict=True)])
        return y.movedim(-1, 1) if self.last else y
