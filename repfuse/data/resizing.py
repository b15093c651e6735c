"""Where the pixels of an image go, as torchvision and timm compute it. Sizes are (height, width)."""

from __future__ import annotations

from repfuse.data.preset import Size


def resized(image: Size, scaled: Size, mode: str) -> Size:
    """Return the size that an image of size ``image`` is resized to, for a preset's ``scaled`` size and ``mode``."""
    if mode == "squash":
        return scaled
    height, width = image
    if mode == "center" and scaled[0] == scaled[1]:
        edge = scaled[0]
        return (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)
    ratios = (height / scaled[0], width / scaled[1])
    ratio = max(ratios) if mode == "border" else min(ratios)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def placed_at(edge: int, cropped: int) -> int:
    """Return where an image's edge begins in a crop at its centre: below 0 where it is cut off."""
    return (cropped - edge) // 2 if edge < cropped else -round((edge - cropped) / 2)
