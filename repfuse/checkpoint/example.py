"""Example inputs: tensors of given shapes, what a network knows of its own, and the guess where nothing is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repfuse.checkpoint.spec import FORM, Shape
from repfuse.errors import RepfuseError
from repfuse.networks import USUAL_SIZE, first_layer
from repfuse.wording import dtype_name, first_line

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def make_inputs(shapes: Sequence[Shape], network: nn.Module) -> tuple[Tensor, ...]:
    """Return one tensor of repeatable random values for each shape, where ``network`` lives and in its dtype."""
    like = _like(network)
    generator = torch.Generator().manual_seed(0)

    def made(shape: Shape) -> Tensor:
        try:
            dtype = getattr(torch, shape.dtype) if shape.dtype else like.dtype
            return random_tensor(shape.sizes, dtype, generator).to(like.device)
        except (RuntimeError, MemoryError, OverflowError) as error:
            raise RepfuseError(f"An input of {shape} cannot be made.", first_line(error), FORM) from error

    return tuple(map(made, shapes))


def shapes_of(inputs: Iterable[Tensor], network: nn.Module) -> tuple[Shape, ...]:
    """Return the shapes that ``make_inputs`` would turn into tensors like ``inputs``."""
    usual = _like(network).dtype
    return tuple(Shape(tuple(x.shape), None if x.dtype == usual else dtype_name(x.dtype)) for x in inputs)


def _like(network: nn.Module) -> Tensor:
    return next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))


def random_tensor(sizes: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return standard normal numbers; of a dtype that holds none, zeros and ones."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(sizes, generator=generator).to(dtype)
    return torch.randint(0, 2, sizes, generator=generator).to(dtype)


def known_shape(network: nn.Module, arguments: Mapping[str, Any]) -> Shape | None:
    """Return the input that ``network`` itself records, or None; ``arguments`` are those that it was built with.

    timm's networks have a configuration with an input size; repfuse's samples have an ``input_shape``.
    """
    if type(network).__module__ == "repfuse.samples":
        return _shape_of(network.input_shape)
    configuration: Any = getattr(network, "pretrained_cfg", None)
    size = configuration.get("input_size") if isinstance(configuration, dict) else None
    known = _shape_of(size) if type(network).__module__.startswith("timm.") else None
    if known is None or len(known.sizes) != 3:
        return None
    # The configuration does not follow ``in_chans``, the first convolution does; some stems move pixels into channels
    # first, and read a multiple of what is configured.
    usual, *pixels = known.sizes
    first = next((layer.in_channels for layer in network.modules() if isinstance(layer, CONVOLUTIONS)), usual)
    return _shape_of((1, arguments.get("in_chans") or (first if first % usual else usual), *pixels))


def _shape_of(sizes: Any) -> Shape | None:
    """Return the shape, or None where the file that holds the network made something else of it."""
    fits = isinstance(sizes, (tuple, list)) and all(isinstance(size, int) and size > 0 for size in sizes)
    return Shape(tuple(sizes)) if fits and sizes else None


def guessed_shape(network: nn.Module) -> Shape:
    """Guess an input from the first convolution or linear layer. Raises RepfuseError where there is neither."""
    if first := first_layer(network):
        _, channels, axes = first
        return Shape((1, channels, *[USUAL_SIZE[axes]] * axes))
    raise RepfuseError(
        "The input of this network is not known, and cannot be guessed.",
        "It has no convolution and no linear layer.",
        "Give it: --input 1x3x224x224",
    )
