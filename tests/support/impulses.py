"""An oracle: the kernel of a block, read off its answers to impulses, beside the kernel that a layer says it has.

At one input size an affine map is known by what it answers to zeros and to an impulse at each place of each channel.
The block is run to get these answers. Of the layer the tensors and settings are read, and the rest is index arithmetic:
no operator that convolves, and nothing of repfuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PADS = {
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), "zeros"),
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d), "reflect"),
    **dict.fromkeys((nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d), "replicate"),
    **dict.fromkeys((nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d), "circular"),
}
OUTSIDE = -1
"""Stands for a place beyond the border, where there is a zero."""

TOLERANCE = 1e-12
WIDEST = 64
FACTORS = (1.0, -(2.0**20))

Size = tuple[int, ...]
Run = Callable[[Tensor], Tensor]
"""Takes ``[N, in, *size]`` in float64, without writing into it, and returns ``[N, out, *size']``."""

Axis = Callable[[int], Tensor]
"""Takes a size, and returns ``[size', taps]``: which place each output reads through each tap."""


class NoOutput(Exception):
    """A layer gives nothing at this size."""


class NotAffine(Exception):
    """A block is no affine map."""


@dataclass(frozen=True)
class Layer:
    """``weight`` is ``[out, in, *taps]`` without groups, ``bias`` ``[out]``; ``axes`` say where the taps lie."""

    weight: Tensor
    bias: Tensor
    axes: tuple[Axis, ...]

    def answers(self, size: Size) -> Tensor:
        """Return what ``read`` returns of a block, by index arithmetic: each tap goes where it reads an impulse."""
        ndim, answers = len(size), self.weight
        for axis, places in zip(self.axes, size, strict=True):
            through = axis(places) == torch.arange(places)[:, None, None]  # [size, size', taps]
            answers = torch.tensordot(answers, through.to(answers.dtype), ([2], [2]))
        answers = answers.permute(1, *range(2, 2 + 2 * ndim, 2), 0, *range(3, 2 + 2 * ndim, 2)).flatten(0, ndim)
        return torch.cat([self.bias.reshape(1, -1, *[1] * ndim).expand_as(answers[:1]), answers])


@torch.no_grad()
def read(run: Run, channels: int, size: Size) -> Tensor:
    """Return ``[1 + impulses, out, *size']``: what a block answers to zeros, and what each impulse adds to that.

    Raises NotAffine where the answer to a whole input is not the sum of these.
    """
    zeros = run(torch.zeros(1, channels, *size, dtype=torch.float64))
    impulses = torch.eye(channels * math.prod(size), dtype=torch.float64).reshape(-1, channels, *size)
    seen = torch.cat([zeros, run(impulses) - zeros])
    for factor in FACTORS:
        x = factor * torch.randn(1, *impulses.shape[1:], generator=torch.Generator().manual_seed(0)).double()
        numbers = torch.cat([x.new_ones(1), x.flatten()])
        expected, most = (torch.tensordot(a, b, 1)[None] for a, b in ((numbers, seen), (numbers.abs(), seen.abs())))
        if not _relative(run(x) - expected, most) <= TOLERANCE:
            raise NotAffine
    return seen


def disagreement(seen: Tensor, layers: Sequence[Layer], size: Size) -> float:
    """Return by how much what was read off a block is not the sum of the layers, relative to the largest number of each
    output channel; infinite where the shapes differ.
    """
    try:
        said = [layer.answers(size) for layer in layers]
    except NoOutput:
        return math.inf
    if any(answers.shape != seen.shape for answers in said):
        return math.inf
    return _relative(seen - torch.stack(said).sum(0), seen)


def _relative(off: Tensor, whole: Tensor) -> float:
    worst, scale = (x.abs().transpose(0, 1).flatten(1).amax(1) for x in (off, whole))
    return float(torch.where(worst == 0, 0.0, worst / scale).nan_to_num(math.inf, math.inf).max())


def sizes_for(layers: Sequence[Layer]) -> list[Size]:
    """Return input sizes: the smallest that shows every tap, one not square, a single pixel, one that has blocks."""
    least = tuple(max(map(_least, axes)) for axes in zip(*(layer.axes for layer in layers), strict=True))
    larger = tuple(n + 1 + axis % 2 for axis, n in enumerate(least))
    parted = tuple(-(-n // 6) * 6 for n in least)
    return list(dict.fromkeys([least, larger, (1,) * len(least), parted]))


def show_every_tap(layers: Sequence[Layer], size: Size) -> bool:
    """Whether each tap of each layer has an output where it alone reads some place of an input of this size."""
    return all(_shows(axis, n) for layer in layers for axis, n in zip(layer.axes, size, strict=True))


def _least(axis: Axis) -> int:
    return next(n for n in range(1, WIDEST) if _shows(axis, n))


def _shows(axis: Axis, size: int) -> bool:
    try:
        table = axis(size)
    except NoOutput:
        return False
    alone = (table[:, :, None] == table[:, None]).sum(2) == 1
    return bool(((table != OUTSIDE) & alone).any(0).all())


def layer_of(module: nn.Module, ndim: int) -> Layer:
    """Read a stock layer, with pads in a Sequential before it; a linear one has one tap on each of ``ndim`` axes."""
    *before, layer = module if isinstance(module, nn.Sequential) else [module]
    pads: list[list[tuple[int, int, str]]] = [[] for _ in range(ndim)]
    for pad in before:
        for axis in range(ndim):  # PyTorch begins with the last one
            pads[ndim - 1 - axis].append((*pad.padding[2 * axis : 2 * axis + 2], PADS[type(pad)]))
    if type(layer) is nn.Linear:
        weight = layer.weight.reshape(*layer.weight.shape, *[1] * ndim)
        return _layer(layer, weight, [partial(_window, 1, 1, 1, of) for of in pads])
    assert type(layer) in CONVOLUTIONS or (type(layer) in TRANSPOSED and not before), type(layer).__name__
    weight = _without_groups(layer.weight, layer.groups)
    settings = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    if type(layer) in TRANSPOSED:
        ends = zip(settings, layer.padding, layer.output_padding, strict=True)
        return _layer(layer, weight.transpose(0, 1), [partial(_spread, *one, cut, more) for one, cut, more in ends])
    own = [(*of, (amount, amount, layer.padding_mode)) for of, amount in zip(pads, layer.padding, strict=True)]
    return _layer(layer, weight, [partial(_window, *one, of) for one, of in zip(settings, own, strict=True)])


def scaling(factor: float, channels: int, ndim: int) -> Layer:
    """Return the layer of ``factor * x``."""
    weight = factor * torch.eye(channels, dtype=torch.float64)
    axes = (partial(_window, 1, 1, 1, ()),) * ndim
    return Layer(weight.reshape(channels, channels, *[1] * ndim), weight.new_zeros(channels), axes)


def _layer(layer: Any, weight: Tensor, axes: Sequence[Axis]) -> Layer:
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
    return Layer(weight.detach(), bias.detach(), tuple(axes))


def _without_groups(weight: Tensor, groups: int) -> Tensor:
    """Return ``[a, b / groups, ...]`` as ``[a, b, ...]``, with zeros between the groups."""
    rows, columns = len(weight) // groups, weight.shape[1]
    full = weight.new_zeros(len(weight), columns * groups, *weight.shape[2:])
    for group, part in enumerate(weight.split(rows)):
        full[group * rows : (group + 1) * rows, group * columns : (group + 1) * columns] = part
    return full


def _window(kernel: int, stride: int, dilation: int, pads: Sequence[tuple[int, int, str]], size: int) -> Tensor:
    """The axis of a convolution: output q reads ``q * stride + k * dilation`` of the input after its pads."""
    places = list(range(size))
    for before, after, mode in pads:
        if max(before, after) > {"reflect": len(places) - 1, "circular": len(places)}.get(mode, math.inf):
            raise NoOutput
        places = [_place(places, index, mode) for index in range(-before, len(places) + after)]
    first = range(0, len(places) - dilation * (kernel - 1), stride)
    if not first:
        raise NoOutput
    return torch.tensor([[places[q + k * dilation] for k in range(kernel)] for q in first])


def _place(places: Sequence[int], index: int, mode: str) -> int:
    last = len(places) - 1
    if 0 <= index <= last:
        return places[index]
    if mode == "zeros":
        return OUTSIDE
    mirrored = -index if index < 0 else 2 * last - index
    return places[{"reflect": mirrored, "replicate": min(max(index, 0), last), "circular": index % (last + 1)}[mode]]


def _spread(kernel: int, stride: int, dilation: int, cut: int, more: int, size: int) -> Tensor:
    """The axis of a transposed one: place p goes to ``p * stride + k * dilation - cut`` of the output."""
    outputs = (size - 1) * stride + dilation * (kernel - 1) + 1 + more - 2 * cut
    if outputs < 1:
        raise NoOutput
    places = torch.arange(outputs)[:, None] + cut - torch.arange(kernel) * dilation
    inside = (places % stride == 0) & (places >= 0) & (places < size * stride)
    return torch.where(inside, places // stride, OUTSIDE)
