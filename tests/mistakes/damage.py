"""Mistakes in what was written: each takes what a site became, and returns it with one thing wrong.

It raises Unfit where there is nothing of the kind that could be wrong.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mistakes.kernels import TRANSPOSED, layer_of

PADS: dict[str, tuple[type[Any], ...]] = {
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
}
CONSTANT = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)

Damage = Callable[[nn.Module], nn.Module]


class Unfit(Exception):
    """There is nothing here that this mistake could be made in."""


def fits(condition: object) -> None:
    """Raise Unfit unless the condition holds."""
    if not condition:
        raise Unfit


def edits(change: Callable[[Any], None]) -> Damage:
    """Return the mistake that ``change`` makes in the layer itself, in place."""

    @torch.no_grad()
    def damage(site: nn.Module) -> nn.Module:
        change(layer_of(site))
        return site

    return damage


def weights(change: Callable[[Tensor, Any], Tensor]) -> Damage:
    """Return the mistake of another weight of the same shape."""

    def damage(layer: Any) -> None:
        layer.weight.copy_(change(layer.weight.clone(), layer))

    return edits(damage)


def one_weight(choose: Callable[[int], int]) -> Damage:
    """Return the mistake of one weight by 1e-4 of itself; ``choose`` picks among those that are not 0, by size."""

    def change(weight: Tensor, layer: Any) -> Tensor:
        flat = weight.flatten()
        order = flat.abs().argsort()
        order = order[flat[order] != 0]
        fits(len(order))
        flat[order[choose(len(order))]] *= 1 + 1e-4
        return flat.view_as(weight)

    return weights(change)


def swapped(axis: int) -> Damage:
    """Return the mistake of two channels changed about: of the output, with the bias, or of the input."""

    def damage(layer: Any) -> None:
        fits(layer.weight.shape[axis] > 1)
        order = [1, 0, *range(2, layer.weight.shape[axis])]
        layer.weight.copy_(layer.weight.index_select(axis, torch.tensor(order)))
        if axis == _output_axis(layer) and layer.bias is not None and len(layer.bias) == len(order):
            layer.bias.copy_(layer.bias[order])

    return edits(damage)


def _output_axis(layer: Any) -> int:
    return 1 if isinstance(layer, TRANSPOSED) else 0


def permuted(layer: Any) -> None:
    """All output channels come one later."""
    fits(not isinstance(layer, TRANSPOSED) and layer.weight.shape[0] > 1)
    layer.weight.copy_(layer.weight.roll(1, 0))
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.roll(1))


def bias_becomes(factor: float) -> Damage:
    """Return the mistake of a bias that is forgotten, or counted twice."""

    def damage(layer: Any) -> None:
        fits(layer.bias is not None)
        layer.bias.mul_(factor)

    return edits(damage)


def no_bias(layer: Any) -> None:
    """The layer has none at all."""
    layer.bias = None


def shifted(axis: int, by: int) -> Damage:
    """Return the mistake of a kernel that is one tap off along an axis."""

    def change(weight: Tensor, layer: Any) -> Tensor:
        fits(weight.dim() > 2 + axis and weight.shape[2 + axis] > 1)
        return weight.roll(by, 2 + axis)

    return weights(change)


def flipped(weight: Tensor, layer: Any) -> Tensor:
    """A convolution, where PyTorch's is a correlation."""
    return weight.flip(*range(2, weight.dim())) if weight.dim() > 2 else weight


def transposed(one: int, other: int) -> Damage:
    """Return the mistake of two axes of the weight changed about."""

    def change(weight: Tensor, layer: Any) -> Tensor:
        fits(weight.dim() > other and weight.shape[one] == weight.shape[other] > 1)
        return weight.transpose(one, other)

    return weights(change)


def undilated(layer: Any) -> None:
    """The setting is forgotten; the padding is such that the size of the output stays."""
    fits(max(getattr(layer, "dilation", (1,))) > 1 and not isinstance(layer, TRANSPOSED))
    excess = [(d - 1) * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    padding = tuple(b - e // 2 for b, e in zip(layer._reversed_padding_repeated_twice[::-2], excess, strict=True))
    fits(min(padding) >= 0)
    layer.dilation, layer.padding = (1,) * len(padding), padding
    layer._reversed_padding_repeated_twice = [size for size in reversed(padding) for _ in range(2)]


def squeezed(weight: Tensor, layer: Any) -> Tensor:
    """A 5x5 kernel's outer taps are where those of a 3x3 are: what was dilated is written as if it were not."""
    fits(weight.dim() > 2 and min(weight.shape[2:]) >= 5)
    result = torch.zeros_like(weight)
    middle = [range(size // 2 - 1, size // 2 + 2) for size in weight.shape[2:]]
    spread = [range(size // 2 - 2, size // 2 + 3, 2) for size in weight.shape[2:]]
    result[_mesh(weight, middle)] = weight[_mesh(weight, spread)]
    return result


def _mesh(weight: Tensor, ranges: list[range]) -> Any:
    axes = [torch.tensor(each) for each in (range(weight.shape[0]), range(weight.shape[1]), *ranges)]
    return torch.meshgrid(*axes, indexing="ij")


def padded_by(kind: str) -> Damage:
    """Return the mistake of a padding that repeats or reflects the input: an error at the border alone."""

    def damage(site: nn.Module) -> nn.Module:
        layer = layer_of(site)
        if layer is not site:
            return _with_pad(site, lambda axes, sizes: PADS[kind][axes - 1](sizes))
        fits(isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and any(layer._reversed_padding_repeated_twice))
        layer.padding_mode = kind
        return layer

    return damage


def padded_with(value: float) -> Damage:
    """Return the mistake of a padding with another number, as of a map that adds a constant."""

    def damage(site: nn.Module) -> nn.Module:
        layer: Any = layer_of(site)
        if layer is not site:
            return _with_pad(site, lambda axes, sizes: CONSTANT[axes - 1](sizes, value))
        sizes = getattr(layer, "_reversed_padding_repeated_twice", [0])
        fits(any(sizes) and not isinstance(layer, TRANSPOSED) and layer.padding_mode == "zeros")
        layer.padding = (0,) * len(layer.kernel_size)
        layer._reversed_padding_repeated_twice = [0] * len(sizes)
        pad = CONSTANT[len(layer.kernel_size) - 1](tuple(sizes), value)
        return nn.Sequential(OrderedDict(pad=pad, conv=layer))

    return damage


def _with_pad(site: Any, make: Callable[[int, tuple[int, ...]], nn.Module]) -> nn.Module:
    sizes = getattr(getattr(site, "pad", None), "padding", (0,))
    fits(max(sizes) > 0)
    site.pad = make(len(sizes) // 2, tuple(sizes))
    return site


def skip_added(factor: float, *, diagonal: bool = False) -> Damage:
    """Return the mistake of a skip too many or too few; or of one that is right for one group alone.

    The identity of a grouped kernel is not the diagonal of ``[C, C / groups]``.
    """

    def change(weight: Tensor, layer: Any) -> Tensor:
        groups = getattr(layer, "groups", 1)
        fits(not isinstance(layer, TRANSPOSED) and weight.shape[0] == weight.shape[1] * groups)
        fits(not diagonal or 1 < groups < weight.shape[0])
        middle = tuple(size // 2 for size in weight.shape[2:])
        rows = torch.arange(weight.shape[0])
        weight[(rows, rows % weight.shape[1], *middle)] += factor
        if diagonal:
            rows = rows[: weight.shape[1]]
            weight[(rows, rows, *middle)] -= factor
        return weight

    return weights(change)


def through_float32(layer: Any) -> None:
    """What was promised in float64 was computed in float32."""
    for tensor in layer.parameters():
        tensor.copy_(tensor.float())


def last_bit(layer: Any) -> None:
    """Each weight is the next number: what is computed cannot show it, what is stored does.

    One alone might be right still: an exact sum may lie half-way between two numbers.
    """
    layer.weight.copy_(torch.nextafter(layer.weight, torch.tensor(torch.inf, dtype=layer.weight.dtype)))


def not_a_number(layer: Any) -> None:
    """One weight is none."""
    layer.weight.flatten()[0] = torch.nan


DAMAGES: dict[str, Damage] = {
    "weight, largest": one_weight(lambda count: count - 1),
    "weight, median": one_weight(lambda count: count // 2),
    "weight, smallest": one_weight(lambda count: 0),
    "swap outputs": swapped(0),
    "swap inputs": swapped(1),
    "permuted output": edits(permuted),
    "bias dropped": edits(no_bias),
    "bias zero": bias_becomes(0.0),
    "bias twice": bias_becomes(2.0),
    **{f"shift, axis {axis}, {by:+}": shifted(axis, by) for axis in range(3) for by in (1, -1)},
    "flipped": weights(flipped),
    "transposed taps": transposed(2, 3),
    "transposed matrix": transposed(0, 1),
    "dilation": edits(undilated),
    "dilated taps": weights(squeezed),
    "border, replicate": padded_by("replicate"),
    "border, reflect": padded_by("reflect"),
    "border, constant": padded_with(1e-3),
    "skip too many": skip_added(1.0),
    "skip missing": skip_added(-1.0),
    "skip in groups": skip_added(1.0, diagonal=True),
    "float32": edits(through_float32),
    "not a number": edits(not_a_number),
}
"""What may go wrong with a convolution that was written."""

STORED: dict[str, Damage] = {**DAMAGES, "last bit": edits(last_bit)}
"""The same, and what only a comparison of the stored numbers sees."""
