"""How images become inputs of a network, as numbers: what timm and torchvision call the transform of evaluation.

The order of operations is timm's: decode to 8 bits per channel, resize, crop at the centre, scale to 0..1, subtract
the mean, divide by the standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
MODES = ("center", "border", "squash")
Size = tuple[int, int]


@dataclass(frozen=True)
class Preset:
    """``origin`` says who says so. ``mean`` and ``std`` are per channel, for pixels in 0..1.

    An image is resized to ``resize / crop`` times the size of the input and cropped to that size; ``mode`` says how it
    is resized: its shorter edge (``center``), its longer edge, then filled up with the mean (``border``), or both,
    whatever its shape (``squash``).
    """

    origin: str
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    interpolation: str = "bilinear"
    mode: str = "center"
    resize: float = 1.0
    crop: float = 1.0

    def scaled(self, size: Size) -> Size:
        """Return the size (height, width) that an image is resized for, where the input has ``size``."""
        height, width = (max(1, math.floor(edge * self.resize / self.crop)) for edge in size)
        return height, width

    def with_numbers(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> Preset:
        """Return the same with another mean and standard deviation, where they are given."""
        return replace(self, mean=tuple(mean or self.mean), std=tuple(std or self.std))

    def unnormalised(self, channels: int) -> Preset:
        """Return the same for pixels in 0..1 as they are."""
        return replace(self, mean=(0.0,) * channels, std=(1.0,) * channels)

    def per_channel(self, channels: int) -> Preset | None:
        """Return the same with a mean and a standard deviation for each channel; None where it has another number."""
        mean, std = (values * channels if len(values) == 1 else values for values in (self.mean, self.std))
        return replace(self, mean=mean, std=std) if len(mean) == len(std) == channels else None

    def normalisation(self) -> str:
        """Return in words what happens to the numbers."""
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        plain = not any(self.mean) and set(self.std) == {1.0}
        return "pixels in 0..1" if plain else f"pixels in 0..1, mean {mean}, std {std}"

    def geometry(self, size: Size) -> str:
        """Return in words what happens to the shape."""
        how = {"center": "to cover", "border": "to fit within", "squash": "to"}[self.mode]
        height, width = self.scaled(size)
        return f"resized {how} {height}x{width} ({self.interpolation}), {size[0]}x{size[1]} at the centre"
