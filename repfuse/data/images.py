"""An image file -> a network's input, as timm and torchvision prepare their networks' images, or by Pillow alone.

Configurations may be strangers' data: every number is checked, none is believed. So may images: decoding is bounded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from repfuse.checkpoint.build import library
from repfuse.checkpoint.formats import CONFIG
from repfuse.checkpoint.opening import WEIGHT_FILES, configuration
from repfuse.errors import RepfuseError
from repfuse.wording import described

if TYPE_CHECKING:
    from PIL.Image import Image

    from repfuse.loading import Checkpoint

Numbers = tuple[float, ...]
Size = tuple[int, int]  # height and width
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # Pillow hands others to programs: EPS to Ghostscript
MODES = {1: "L", 3: "RGB"}
DEEP = ("I", "F")  # modes of more than 8 bits begin so: conversion to 8 bits cuts them off
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # of timm's, all but a random one
COVERING = "to cover"
FITTING = {"border": "to fit within", "squash": "to"}  # timm's other crop modes
PER_CHANNEL = 16  # numbers at most
ENLARGED = 4.0  # the largest ratio, either way, of the resized image to the crop: more is a mistake or an attack


class Preparing(NamedTuple):
    """``transform`` makes ``[C, H, W]`` of an image; ``geometry`` says how it is resized and cut for that."""

    transform: Callable[[Image], torch.Tensor]
    geometry: str


@dataclass(frozen=True)
class Preset:
    """``origin`` says who prepares images so: ``mean`` and ``std`` are per channel or one for all, for pixels in 0..1.

    ``preparing`` makes what prepares them, from the size of the input and a mean and a deviation for each channel.
    """

    origin: str
    mean: Numbers
    std: Numbers
    preparing: Callable[[Size, Numbers, Numbers], Preparing]


def pillow() -> Any:
    """Return the package PIL. Raises RepfuseError where Pillow is not installed."""
    library("PIL.ImageOps", "images")
    return library("PIL", "images")


def read_image(path: Path, channels: int, preparing: Preparing) -> torch.Tensor:
    """Return the image at ``path``, prepared.

    As timm and torchvision do, it leaves out transparency and takes no notice of a rotation that the file asks for.
    Raises RepfuseError, which names the file, where it is damaged, none of FORMATS, or far too large.
    """
    try:
        return preparing.transform(_decoded(path, MODES[channels]))
    except Exception as error:  # a damaged file can make its decoder fail in any way
        raise RepfuseError(
            f"The image {path} cannot be read.",
            described(error),
            "Mend it or move it away: repfuse leaves out no image silently.",
        ) from error


def _decoded(path: Path, mode: str) -> Image:
    pil = pillow().Image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", pil.DecompressionBombWarning)
        with pil.open(path, formats=FORMATS) as image:
            if image.mode.startswith(DEEP):
                raise ValueError(f"it has more than 8 bits per pixel (mode {image.mode}): give tensors instead")
            return image.convert(mode)  # type: ignore[no-any-return]


def normalised(pixels: torch.Tensor, mean: Numbers, std: Numbers, dtype: torch.dtype) -> torch.Tensor:
    """Return (pixels / 255 - mean) / std for uint8 ``[..., C, H, W]``; computed in float32, or ``dtype`` if wider."""
    wide = torch.promote_types(dtype, torch.float32)
    means, stds = (torch.tensor(values, dtype=wide).reshape(-1, 1, 1) for values in (mean, std))
    return pixels.to(wide).div_(255).sub_(means).div_(stds).to(dtype)


def by_pillow(size: Size, mean: Numbers, std: Numbers) -> Preparing:
    """Return what prepares images where nothing more is known: they cover the input, and are cut at the centre."""
    pil = pillow()

    def transform(image: Image) -> torch.Tensor:
        fitted = pil.ImageOps.fit(image, size[::-1], pil.Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(fitted)).reshape(*size, len(mean)).permute(2, 0, 1)
        return normalised(pixels, mean, std, torch.float32)

    return Preparing(transform, _geometry(COVERING, size, "bilinear", size))


def of_timm(config: Any, origin: str) -> Preset | None:
    """Return how timm prepares images for ``config``, a ``pretrained_cfg``; None where it gives no sound numbers."""
    if not isinstance(config, dict):
        return None
    mean: Any = config.get("mean")
    std: Any = config.get("std")
    crop = config.get("crop_pct")
    fits = _numbers(mean) and _numbers(std) and len(mean) == len(std) and min(std) > 0
    fits = fits and (crop is None or (_number(crop) and 1 / ENLARGED <= crop <= ENLARGED))
    if not fits or config.get("interpolation") not in (None, *INTERPOLATIONS):
        return None
    return Preset(origin, tuple(mean), tuple(std), partial(_by_timm, config))


def _by_timm(config: dict[str, Any], size: Size, mean: Numbers, std: Numbers) -> Preparing:
    try:
        data = library("timm").data
    except RepfuseError as error:
        plain = by_pillow(size, mean, std)
        return plain._replace(geometry=f"{plain.geometry} and not as timm would ({error.what.rstrip('.')})")
    told = {"input_size": (len(mean), *size), "mean": mean, "std": std}
    resolved = data.resolve_data_config(told, pretrained_cfg=config)
    scaled = (math.floor(size[0] / resolved["crop_pct"]), math.floor(size[1] / resolved["crop_pct"]))
    fitting = FITTING.get(str(resolved["crop_mode"]), COVERING)
    said = _geometry(fitting, scaled, resolved["interpolation"], size)
    return Preparing(data.create_transform(**resolved), said)


def of_torchvision(name: str) -> Preset | None:
    """Return how images are prepared for the usual weights of the network ``name``; None where they are only scaled."""
    try:
        weights = library("torchvision").models.get_model_weights(name).DEFAULT
    except (ValueError, AttributeError):  # a network without any
        return None
    usual = weights.transforms()
    if not all(isinstance(getattr(usual, name, None), list) for name in ("mean", "std", "resize_size")):
        return None
    return Preset(f"torchvision's {weights}", tuple(usual.mean), tuple(usual.std), partial(_by_torchvision, weights))


def _by_torchvision(weights: Any, size: Size, mean: Numbers, std: Numbers) -> Preparing:
    """For an input of another size, what is resized keeps its ratio to what is cropped, if anything is."""
    usual, edge = weights.transforms(), max(size)
    crops = hasattr(usual, "crop_size")
    resized = edge * usual.resize_size[0] // usual.crop_size[0] if crops else edge
    told = {"mean": mean, "std": std, "resize_size": resized} | ({"crop_size": edge} if crops else {})
    transforms = library("torchvision").transforms
    whole = transforms.Compose([weights.transforms(**told), transforms.CenterCrop(size)])
    return Preparing(whole, _geometry(COVERING, (resized, resized), usual.interpolation.value, size))


def _geometry(fitting: str, scaled: Size, interpolation: str, size: Size) -> str:
    return f"resized {fitting} {scaled[0]}x{scaled[1]} ({interpolation}), {size[0]}x{size[1]} at the centre"


def known(checkpoint: Checkpoint) -> Preset | None:
    """Return how images are prepared for the network of ``checkpoint``; None where nothing that it has says it.

    A snapshot of the Hugging Face hub says it in its configuration; a network of timm carries what it was published
    with; for one of torchvision it is that of its usual weights. What makes no sense is no answer.
    """
    return next((preset for preset in _candidates(checkpoint) if preset), None)


def _candidates(checkpoint: Checkpoint) -> Iterator[Preset | None]:
    if checkpoint.path.name in WEIGHT_FILES:
        with suppress(RepfuseError):
            config = configuration(checkpoint.path.with_name(CONFIG))
            yield of_timm(config.get("pretrained_cfg", config), CONFIG)
    yield of_timm(vars(checkpoint.module).get("pretrained_cfg"), "timm's configuration of the network")
    if checkpoint.source is not None and checkpoint.source.kind == "torchvision":
        yield of_torchvision(checkpoint.source.parts[1])


def _numbers(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and 0 < len(values) <= PER_CHANNEL and all(map(_number, values))


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6
