"""An image file -> its pixels at the size of a network's input. Pillow decodes; what it decodes is bounded."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from repfuse.data.preset import Preset, Size
from repfuse.data.resizing import placed_at, resized
from repfuse.errors import RepfuseError
from repfuse.wording import described

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # Pillow hands others to programs: EPS to Ghostscript
MODES = {1: "L", 3: "RGB"}
DEEP = ("I", "F")  # modes of more than 8 bits begin so: conversion to 8 bits cuts them off


def pillow() -> Any:
    """Return the module PIL.Image. Raises RepfuseError where Pillow is not installed."""
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        what = "A folder of images needs Pillow, which is not installed."
        raise RepfuseError(what, str(error), "Install it: pip install 'repfuse[images]'.") from error


def pixels(path: Path, channels: int, size: Size, preset: Preset) -> torch.Tensor:
    """Return the image, resized and cropped as ``preset`` says, as uint8 ``[channels, *size]``.

    As timm and torchvision do, it leaves out transparency and takes no notice of a rotation that the file asks for.
    Raises RepfuseError, which names the file, where it is damaged, none of FORMATS, or far too large.
    """
    try:
        image = _decoded(path, MODES[channels])
        return torch.from_numpy(np.array(_fitted(image, size, preset))).reshape(*size, channels).permute(2, 0, 1)
    except Exception as error:  # a damaged file can make its decoder fail in any way
        raise RepfuseError(
            f"The image {path} cannot be read.",
            described(error),
            "Mend it or move it away: repfuse leaves out no image silently.",
        ) from error


def _decoded(path: Path, mode: str) -> Image:
    library = pillow()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", library.DecompressionBombWarning)
        with library.open(path, formats=FORMATS) as image:
            if image.mode.startswith(DEEP):
                raise ValueError(f"it has more than 8 bits per pixel (mode {image.mode}): give tensors instead")
            return image.convert(mode)  # type: ignore[no-any-return]


def _fitted(image: Image, size: Size, preset: Preset) -> Image:
    library = pillow()
    height, width = resized((image.height, image.width), preset.scaled(size), preset.mode)
    if height * width > library.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels would become {width}x{height}")
    image = image.resize((width, height), library.Resampling[preset.interpolation.upper()])
    canvas: Image = library.new(image.mode, size[::-1], _filling(preset))
    canvas.paste(image, (placed_at(width, size[1]), placed_at(height, size[0])))
    return canvas


def _filling(preset: Preset) -> Any:
    """Return the colour, as Pillow takes it, of what an image leaves free: black, or the mean for ``border``."""
    means = preset.mean if preset.mode == "border" else (0.0,) * len(preset.mean)
    colours = tuple(min(255, max(0, round(255 * mean))) for mean in means)
    return colours if len(colours) > 1 else colours[0]
