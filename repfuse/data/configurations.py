"""Presets from three kinds of configuration. They may be strangers' data: every number is checked, none is believed.

Each function returns None where the configuration holds no mean and standard deviation, or one that makes no sense.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from repfuse.data.preset import INTERPOLATIONS, MODES, Preset

PER_CHANNEL = 16  # numbers at most
ENLARGED = 4.0  # the largest ratio, either way, of the resized image to the crop: more is a mistake or an attack
RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
CROP = 0.875  # where timm's configuration does not say it


def of_timm(config: Any, origin: str) -> Preset | None:
    """Return the preset in ``config``, a ``pretrained_cfg`` of timm."""
    if not isinstance(config, dict):
        return None
    crop = config.get("crop_pct") or CROP
    interpolation, mode = config.get("interpolation") or "bicubic", config.get("crop_mode") or "center"
    mean, std = config.get("mean"), config.get("std")
    return _checked(Preset(origin, mean, std, interpolation, mode, 1.0, crop))  # type: ignore[arg-type]


def of_torchvision(transforms: Any, origin: str) -> Preset | None:
    """Return the preset of a transform that torchvision evaluates with; one that only resizes crops nothing away."""
    mean, std, size = (getattr(transforms, name, None) for name in ("mean", "std", "resize_size"))
    crop = getattr(transforms, "crop_size", size)
    interpolation = getattr(getattr(transforms, "interpolation", None), "value", None)
    if not (isinstance(size, list) and isinstance(crop, list) and len(size) == len(crop) == 1):
        return None
    return _checked(Preset(origin, mean, std, interpolation, "center", size[0], crop[0]))  # type: ignore[arg-type]


def of_processor(config: dict[str, Any], origin: str) -> Preset | None:
    """Return the preset in ``config``, a ``preprocessor_config.json`` of transformers."""
    scale = config.get("rescale_factor", 1 / 255)
    if config.get("do_normalize") is False or not _number(scale) or not math.isclose(scale, 1 / 255, rel_tol=1e-3):
        return None
    resample = config.get("resample", 2)
    interpolation = RESAMPLE[resample] if type(resample) is int and 0 <= resample < len(RESAMPLE) else None
    size, crop = config.get("size"), _edge(config.get("crop_size"))
    ratio = (_edge(size), crop) if crop and config.get("do_center_crop") else (1.0, config.get("crop_pct") or 1.0)
    mode = "squash" if isinstance(size, dict) and "height" in size else "center"
    mean, std = config.get("image_mean"), config.get("image_std")
    return _checked(Preset(origin, mean, std, interpolation, mode, *ratio))  # type: ignore[arg-type]


def _edge(size: Any) -> Any:
    """Return the one number that says a size: 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    if not isinstance(size, dict):
        return size
    edges = [size[name] for name in ("shortest_edge", "height", "width") if name in size]
    return edges[0] if edges and edges.count(edges[0]) == len(edges) else None


def _checked(preset: Preset) -> Preset | None:
    """Return ``preset``, whose values may be anything until here, where all of them make sense."""
    mean, std = preset.mean, preset.std
    fits = _numbers(mean) and _numbers(std) and len(mean) == len(std) and min(std) > 0
    fits = fits and preset.interpolation in INTERPOLATIONS and preset.mode in MODES
    fits = fits and all(_number(size) and size > 0 for size in (preset.resize, preset.crop))
    if not fits or not 1 / ENLARGED <= preset.resize / preset.crop <= ENLARGED:
        return None
    return replace(preset, mean=tuple(mean), std=tuple(std))


def _numbers(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and 0 < len(values) <= PER_CHANNEL and all(map(_number, values))


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6
