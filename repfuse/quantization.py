"""What rounding to few bits leaves of weights: arithmetic on the kernels alone, before anybody quantises.

Symmetric uniform rounding, of a whole tensor in steps of one size or of each channel in its own: R. Krishnamoorthi,
"Quantizing deep convolutional networks for efficient inference", arXiv 1806.08342, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log10
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from repfuse.algebra.expression import Expression
    from repfuse.plans import Plan

BITS = (8, 4)
ENOUGH = 10.0
"""Decibels: less, and more than a tenth of a signal's energy, a third of its size, is noise."""
DEAD, TINY = 1e-6, 1e-30


def rounded(weight: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """Return the nearest multiples of one step, ``2^(bits-1) - 1`` of which reach the largest number.

    With ``axis``, each slice along it has a step of its own; where all is zero, it stays.
    """
    return _in_steps(weight, ranges(weight, axis, keepdim=True), bits)


def _in_steps(weight: Tensor, largest: Tensor, bits: int, room: Tensor | None = None) -> Tensor:
    """Return the multiples, in the memory of ``room`` where that is given."""
    import torch

    step = largest / (2 ** (bits - 1) - 1)
    step += step == 0
    return torch.div(weight, step, out=room).round_().mul_(step)


def ranges(weight: Tensor, axis: int | None = 0, *, keepdim: bool = False) -> Tensor:
    """Return the largest magnitude of floating numbers in each slice along ``axis``, of a kernel's output channels
    along the first; in all of it, where there is none.
    """
    others = [other for other in range(weight.dim()) if axis is None or other != axis % weight.dim()]
    if not others:
        return weight.abs()
    return weight.amax(others, keepdim=keepdim).maximum(weight.amin(others, keepdim=keepdim).neg())  # without a copy


def signal_to_noise(signal: Tensor, found: Tensor) -> float:
    """Return 10 log10 of the energy of ``signal`` over that of what ``found`` is off by: decibels."""
    noise, size = float((found - signal).norm()), float(signal.norm())
    return in_decibels((noise / size) ** 2) if size > 0 else inf if noise == 0 else -inf


def in_decibels(share: float) -> float:
    """Return the signal-to-noise where noise has this share of a signal's energy."""
    return -10 * log10(share) if share > 0 else inf


def together(levels: Sequence[float]) -> float:
    """Return the signal-to-noise of layers in a row, each of which hands noise on as it is: their noises add up."""
    return in_decibels(sum(10 ** (-level / 10) for level in levels))


def needed(layers: int) -> float:
    """Return the signal-to-noise that each of so many layers in a row needs for ENOUGH of all."""
    return ENOUGH + 10 * log10(max(1, layers))


@dataclass(frozen=True)
class Rounded:
    """The signal-to-noise of a kernel ``[C_out, ...]`` with so many ``bits``, each output channel counting alike.

    In that of the whole tensor the largest channel hides that all others became 0, and what comes after a small channel
    may scale it up again. One of a range of DEAD of the median's counts for nothing.
    """

    bits: int
    per_tensor: float
    per_channel: float


@dataclass(frozen=True)
class Kernel:
    """``ranges`` are the least, the quartiles and the largest of the ranges of the output channels; ``rounded`` is what
    rounding leaves of the weights.
    """

    ranges: tuple[float, float, float, float, float]
    rounded: tuple[Rounded, ...]

    @property
    def spread(self) -> float:
        """How many times as large as that of the median channel the largest range is."""
        return self.ranges[4] / self.ranges[2] if self.ranges[2] else inf

    def at(self, bits: int) -> Rounded:
        """Return what so many bits leave."""
        return next(each for each in self.rounded if each.bits == bits)


@dataclass(frozen=True)
class SiteKernels:
    """The kernel at ``path`` after the merge, and before it the stored weight, ``replaced``, that rounding hurts most
    of the convolutions that it replaces: their norms are apart from it there.
    """

    path: str
    replaced: str
    before: Kernel
    after: Kernel


def failing(sites: Sequence[SiteKernels], bits: int) -> list[SiteKernels]:
    """Return the sites that have less than each of them needs with so many bits per tensor, worst first."""
    worst = sorted(sites, key=lambda site: site.after.at(bits).per_tensor)
    return [site for site in worst if site.after.at(bits).per_tensor < needed(len(sites))]


def kernel(weight: Tensor) -> Kernel:
    """Return what is to be said of a weight ``[C_out, ...]``."""
    weight = weight.detach()
    each = ranges(weight, keepdim=True)
    channels = each.flatten()
    alive, energy = channels > DEAD * channels.median(), _energies(weight)
    room = weight.new_empty(weight.shape)  # for all: to fetch memory takes longer than to fill it

    def left(bits: int, largest: Tensor) -> float:
        noise = _energies(_in_steps(weight, largest, bits, room).sub_(weight))
        return in_decibels(float((noise[alive] / energy[alive]).mean())) if bool(alive.any()) else inf

    sizes = channels.sort().values.tolist()
    least, lower, median, upper, most = (sizes[round(part * (len(sizes) - 1) / 4)] for part in range(5))
    levels = (Rounded(bits, left(bits, channels.max()), left(bits, each)) for bits in BITS)
    return Kernel((least, lower, median, upper, most), tuple(levels))


def _energies(weight: Tensor) -> Tensor:
    """Return the sum of the squares in each output channel."""
    norms: Tensor = weight.reshape(len(weight), -1).norm(dim=1)
    return norms.double().square()


def kernels(network: nn.Module, plan: Plan) -> tuple[SiteKernels, ...]:
    """Return the kernels of a plan's sites before and after, those that rounding to 8 bits per tensor hurts most first.

    What holds no finite numbers is left out.
    """
    found = _sites(network, plan) if plan.sites else ()
    return tuple(sorted(found, key=lambda site: site.after.at(BITS[0]).per_tensor))


def _sites(network: nn.Module, plan: Plan) -> Iterator[SiteKernels]:
    import torch

    from repfuse.algebra.affine import swap_layout
    from repfuse.algebra.evaluation import evaluate, stored_weight
    from repfuse.algebra.expression import convolutions
    from repfuse.planning.edits import stored_like
    from repfuse.planning.replaying import replay
    from repfuse.recording.constants import lookup

    planner, layout = replay(network, plan)
    constants = planner.recording.constants
    tensors = lookup(network, constants)

    def weight(expression: Expression) -> Tensor:
        device = stored_like(expression, constants, tensors).device
        stored, _ = evaluate(expression, tensors, torch.empty(0, dtype=torch.float32, device=device))
        return swap_layout(expression.geometry, stored)

    for fused in layout.fused:
        made = weight(fused.expression)
        if fused.norm:  # which has the sizes of the channels
            made /= ranges(made, keepdim=True).clamp(min=TINY)
        layers = {layer.weight: layer for layer in convolutions(fused.expression)}
        before = {name: kernel(stored_weight(layer, tensors).float()) for name, layer in layers.items()}
        if made.numel() and bool(ranges(made, None).isfinite()):
            worst = min(before, key=lambda name: before[name].at(8).per_tensor)
            yield SiteKernels(fused.path, worst, before[worst], kernel(made))
