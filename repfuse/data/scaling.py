"""Pixels of 8 bits -> a network's input: their axes in order, their values in 0..1, and normalised."""

from __future__ import annotations

from collections.abc import Callable

import torch

from repfuse.data.preset import Preset
from repfuse.errors import RepfuseError


def normalised(pixels: torch.Tensor, preset: Preset, dtype: torch.dtype) -> torch.Tensor:
    """Return (pixels / 255 - mean) / std for uint8 ``[N, C, H, W]``; computed in float32, or in ``dtype`` if wider."""
    wide = torch.promote_types(dtype, torch.float32)
    mean, std = (torch.tensor(values, dtype=wide).reshape(-1, 1, 1) for values in (preset.mean, preset.std))
    return pixels.to(wide).div_(255).sub_(mean).div_(std).to(dtype)


def laid_out(shape: tuple[int, ...], channels: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    """Return what makes ``[N, C, H, W]`` of a batch of uint8 images, and in words how they lie.

    Where both readings are possible, the channels come first. Raises RepfuseError where neither is.
    """
    if len(shape) == 4 and shape[1] == channels:
        return (lambda x: x), "samples x channels x height x width"
    if len(shape) == 4 and shape[3] == channels:
        return (lambda x: x.permute(0, 3, 1, 2)), "samples x height x width x channels"
    if len(shape) == 3 and channels == 1:
        return (lambda x: x.unsqueeze(1)), "samples x height x width"
    sizes = "x".join(map(str, shape))
    what = f"The data is {sizes} of uint8, and the network takes images of {channels} channels."
    hint = f"Give Nx{channels}xHxW or NxHxWx{channels}."
    raise RepfuseError(what, "None of its axes can be the channels.", hint)
