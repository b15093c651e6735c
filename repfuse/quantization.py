"""What rounding to few bits leaves of weights: arithmetic on the kernels alone, before anybody quantises.

Symmetric uniform rounding, of a whole tensor in steps of one size or of each channel in its own: R. Krishnamoorthi,
"Quantizing deep convolutional networks for efficient inference", arXiv 1806.08342, section 2.
"""

from __future__ import annotations

from math import inf, log10
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BITS = (8, 4)


def rounded(weight: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """Return the nearest multiples of one step, ``2^(bits-1) - 1`` of which reach the largest number.

    With ``axis``, each slice along it has a step of its own; where all is zero, it stays.
    """
    others = [other for other in range(weight.dim()) if axis is None or other != axis % weight.dim()]
    step = (weight.abs().amax(others, keepdim=True) if others else weight.abs()) / (2 ** (bits - 1) - 1)
    step += step == 0
    multiples: Tensor = weight / step
    return multiples.round_().mul_(step)


def signal_to_noise(signal: Tensor, found: Tensor) -> float:
    """Return 10 log10 of the energy of ``signal`` over that of what ``found`` is off by: decibels."""
    noise, size = float((found - signal).norm()), float(signal.norm())
    if not size:
        return inf if noise == 0 else -inf
    return -10 * log10((noise / size) ** 2) if noise > 0 else inf
