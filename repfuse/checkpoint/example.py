"""Example inputs: their shapes as text, what a network knows of its own, and the guess where nothing is known."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from repfuse.errors import RepfuseError
from repfuse.wording import first_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FORM = (
    "Write it as 1x3x224x224, with a dtype after a colon where it matters (1x3x224x224:float16), several with commas."
)
GUESSED_SIZE = {1: 224, 2: 224, 3: 32}  # by the number of spatial axes
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Shape:
    """One input: its sizes with the batch first, and its dtype where it is given."""

    sizes: tuple[int, ...]
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        dtype = f":{str(self.dtype).removeprefix('torch.')}" if self.dtype else ""
        return "x".join(map(str, self.sizes)) + dtype


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Return the inputs that ``text`` describes, such as ``1x3x224x224`` or ``1x3x64x64:float16,1x10:int64``."""
    shapes = tuple(_parse(part.strip()) for part in text.split(","))
    if len(shapes) > 1 and all(len(shape.sizes) == 1 for shape in shapes):
        raise RepfuseError(f"{text!r} is not an input shape.", "A comma separates inputs, x the sizes of one.", FORM)
    return shapes


def _parse(part: str) -> Shape:
    match = re.fullmatch(r"([1-9]\d{0,17}(?:x[1-9]\d{0,17})*)(?::(?:torch\.)?(\w+))?", part)
    if not match:
        raise RepfuseError(f"{part!r} is not an input shape.", "Sizes are positive whole numbers.", FORM)
    dtype = getattr(torch, match[2], None) if match[2] else None
    if match[2] and not isinstance(dtype, torch.dtype):
        raise RepfuseError(f"{match[2]!r} is not a dtype of torch.", "", "Use float32, float16, bfloat16, int64, ...")
    return Shape(tuple(int(size) for size in match[1].split("x")), dtype)


def render(shapes: Iterable[Shape]) -> str:
    """Return the text that ``parse_shapes`` reads."""
    return ",".join(map(str, shapes))


def make_inputs(shapes: Iterable[Shape], network: nn.Module) -> tuple[Tensor, ...]:
    """Return one tensor of repeatable random values for each shape, where ``network`` lives and in its dtype."""
    like = _like(network)
    generator = torch.Generator().manual_seed(0)
    return tuple(_tensor(shape, shape.dtype or like.dtype, generator).to(like.device) for shape in shapes)


def shapes_of(inputs: Iterable[Tensor], network: nn.Module) -> tuple[Shape, ...]:
    """Return the shapes that ``make_inputs`` would turn into tensors like ``inputs``."""
    usual = _like(network).dtype
    return tuple(Shape(tuple(x.shape), None if x.dtype == usual else x.dtype) for x in inputs)


def _like(network: nn.Module) -> Tensor:
    return next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))


def _tensor(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    try:
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape.sizes, generator=generator).to(dtype)
        return torch.randint(0, 2, shape.sizes, generator=generator).to(dtype)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise RepfuseError(f"An input of {shape} cannot be made.", first_line(error), FORM) from error


def known_shape(network: nn.Module, arguments: Mapping[str, Any]) -> Shape | None:
    """Return the input that ``network`` itself records, or None; ``arguments`` are those that it was built with.

    timm's networks have a configuration with an input size; repfuse's samples have an ``input_shape``.
    """
    if type(network).__module__ == "repfuse.samples":
        return _shape_of(network.input_shape)
    configuration: Any = getattr(network, "pretrained_cfg", None)
    size = configuration.get("input_size") if isinstance(configuration, dict) else None
    if type(network).__module__.startswith("timm.") and isinstance(size, (tuple, list)) and len(size) == 3:
        return _shape_of((1, arguments.get("in_chans") or _channels(network, size[0]), *size[1:]))
    return None


def _shape_of(sizes: Any) -> Shape | None:
    """Return the shape, or None where the file that holds the network made something else of it."""
    fits = isinstance(sizes, (tuple, list)) and all(isinstance(size, int) and size > 0 for size in sizes)
    return Shape(tuple(sizes)) if fits and sizes else None


def _channels(network: nn.Module, configured: int) -> int:
    """Return the input channels: the configuration does not follow ``in_chans``, the first convolution does.

    Some stems move pixels into channels first: those read a multiple of what is configured.
    """
    first = next((layer.in_channels for layer in network.modules() if isinstance(layer, CONVOLUTIONS)), configured)
    return first if first % configured else configured


def guessed_shape(network: nn.Module) -> Shape:
    """Guess an input from the first convolution or linear layer. Raises RepfuseError where there is neither."""
    for layer in network.modules():
        if isinstance(layer, (*CONVOLUTIONS, nn.Linear)) and isinstance(layer.weight, Tensor):
            axes = layer.weight.dim() - 2
            channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            if shape := _shape_of((1, channels, *[GUESSED_SIZE.get(axes, 0)] * axes)):
                return shape
    raise RepfuseError(
        "The input of this network is not known, and cannot be guessed.",
        "It has no convolution and no linear layer.",
        "Give it: --input 1x3x224x224",
    )
