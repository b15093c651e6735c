"""Steps that move pixels or channels and compute nothing: pads, crops, chunks, shuffles, joins."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from support.programs.made import Holder, Made, Pick, Unfit, axes_of, function
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten


def pad(pick: Pick, x: Tensor) -> Made:
    """``F.pad`` of every mode and value; negative amounts crop."""
    ndim = axes_of(x)
    amounts = pick.of((1, 1, 2, "mixed"))
    pads = list(pick.each((0, 1, 2, -1, 1), 2 * ndim)) if amounts == "mixed" else [amounts] * (2 * ndim)
    value = pick.of((0, 0, 0, 0.5))
    modes = ("reflect", "replicate", "circular")
    mode = pick.of(modes)
    outward = [max(amount, 0) for amount in pads]  # torch leaves memory unset where circular padding crops
    zero = getattr(nn, f"ConstantPad{ndim}d")(tuple(pads), value)
    return pick.of(
        (
            function(lambda x: F.pad(x, pads, value=value)),
            function(lambda x: F.pad(x, pads)),
            Made(lambda m, x: m(x), zero),
            function(lambda x: aten.constant_pad_nd.default(x, pads, value)),
            function(lambda x: aten.pad.default(x, pads, "constant", value)),
            function(lambda x: F.pad(x, outward, mode=mode)),
            function(lambda x: F.pad(x, pads[:2])),
        )
    )


def crop(pick: Pick, x: Tensor) -> Made:
    """A slice along the spatial axes, with steps."""
    ndim = axes_of(x)
    entries = tuple(
        slice(pick.of((None, 1, 0, 2)), pick.of((None, -1, -2, None, 3)), pick.of((None, None, 2))) for _ in range(ndim)
    )
    first = entries[-1]
    return pick.of(
        (
            function(lambda x: x[(slice(None), slice(None), *entries)]),
            function(lambda x: x[(..., *entries)]),
            function(lambda x: x[..., entries[-1]]),
            function(lambda x: F.pad(x, [-1, -1] * ndim)),
            function(lambda x: aten.slice.Tensor(x, -1, first.start, first.stop, first.step or 1)),
            function(lambda x: x[(slice(None), slice(0, 2), *entries)]),
        )
    )


def choose(pick: Pick, x: Tensor) -> Made:
    """Some of the channels: slices, lists, chunks."""
    axis = -1 if x.ndim == 2 or (x.ndim == 3 and pick.of((False, True))) else 1
    channels = x.shape[axis]
    half, index = channels // 2, pick.of((0, 1))
    if channels < 2:
        raise Unfit(x.shape)
    order = [(3 * i + 1) % channels for i in range(channels)]
    before: Any = (...,) if axis == -1 else (slice(None),)
    return pick.of(
        (
            function(lambda x: x[(*before, slice(0, half))]),
            function(lambda x: x[(*before, slice(half, None))]),
            function(lambda x: x.chunk(2, axis)[index]),
            function(lambda x: torch.split(x, [1, channels - 1], dim=axis)[index]),
            function(lambda x: x[(*before, order)]),
            function(lambda x: x[(*before, slice(None, None, 2))]),
            function(lambda x: x.flip(axis)),
            function(lambda x: x.narrow(axis, half - 1, 2)),
            function(lambda x: aten.slice.Tensor(x, axis, 1, channels)),
            function(lambda x: aten.split.Tensor(x, half, axis)[index]),
            function(lambda x: x[(*before, slice(-1, None))]),
            function(lambda x: x.repeat_interleave(2, axis)),
            Made(lambda m, x: x.index_select(axis, m.order), _Order(order)),
            Made(lambda m, x: x[(*before, m.order)], _Order(order)),
        )
    )


class _Order(nn.Module):
    """Holds an order of channels in a buffer."""

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(order))


def shuffle(pick: Pick, x: Tensor) -> Made:
    """A channel shuffle written out, or something that only looks like one."""
    ndim, channels = axes_of(x), x.shape[1]
    groups = pick.of((2, channels, 1))
    if channels % groups:
        raise Unfit(x.shape)
    each = channels // groups

    def sizes(x: Tensor) -> list[int]:
        return [x.size(axis) for axis in range(2, ndim + 2)]

    def written(x: Tensor) -> Tensor:
        turned = x.view(x.size(0), groups, each, *sizes(x)).transpose(1, 2).contiguous()
        return turned.view(x.size(0), channels, *sizes(x))

    return pick.of(
        (
            function(written),
            function(lambda x: x.reshape(x.shape[0], groups, each, *sizes(x)).transpose(1, 2).flatten(1, 2)),
            Made(lambda m, x: m(x), nn.ChannelShuffle(groups)),
            function(lambda x: x.reshape(-1, each, *sizes(x)).reshape(x.shape[0], -1, *sizes(x))),
            function(lambda x: x.transpose(1, 2).transpose(1, 2)),
        )
    )


def space(pick: Pick, x: Tensor) -> Made:
    """Pixels become channels, or channels pixels; or there are more pixels. Only some sizes can be parted."""
    ndim, channels = axes_of(x), x.shape[1]
    linear = ("linear", "bilinear", "trilinear")[ndim - 1]
    even = [amount for n in reversed(x.shape[2:]) for amount in (0, n % 2)]

    def parted(x: Tensor) -> list[Tensor]:
        slices = itertools.product(*[(slice(None, None, 2), slice(1, None, 2))] * ndim)
        return [F.pad(x, even)[(..., *each)] for each in slices]

    def viewed(x: Tensor) -> Tensor:
        y = F.pad(x, even)
        halves = [size for n in y.shape[2:] for size in (n // 2, 2)]
        inner, outer = range(3, 2 + 2 * ndim, 2), range(2, 2 + 2 * ndim, 2)
        turned = y.view(y.size(0), channels, *halves).permute(0, *inner, 1, *outer)
        return turned.reshape(y.size(0), -1, *(n // 2 for n in y.shape[2:]))

    made = [
        function(lambda x: torch.cat(parted(x), 1)),
        function(lambda x: torch.cat(parted(x)[::-1], 1)),
        function(lambda x: torch.cat(parted(x)[:2], 1)),
        function(viewed),
        function(lambda x: F.interpolate(x, scale_factor=2)),
        function(lambda x: F.interpolate(x, size=[n + 1 for n in x.shape[2:]], mode=linear)),
    ]
    if ndim == 2:
        made += [function(lambda x: F.pixel_unshuffle(F.pad(x, even), 2)), Made(lambda m, x: m(x), nn.PixelShuffle(2))]
    return pick.of(tuple(made))


def branches_of_channels(pick: Pick, x: Tensor) -> Made:
    """One part of the channels goes through a convolution, the rest passes beside it."""
    ndim, channels = axes_of(x), x.shape[1]
    if channels < 2:
        raise Unfit(x.shape)
    half, kernel = channels // 2, pick.of((3, 1))
    module = getattr(nn, f"Conv{ndim}d")(half, half, kernel, padding=kernel // 2, bias=pick.of((True, False)))
    rest = channels - half
    return pick.of(
        (
            Made(lambda m, x: torch.cat([m(x[:, :half]), x[:, half:]], 1), module),
            Made(lambda m, x: torch.cat([x[:, half:], m(x[:, :half])], dim=1), module),
            Made(lambda m, x: _joined(m, x.split([half, rest], 1)), module),
        )
    )


def _joined(module: nn.Module, pieces: Sequence[Tensor]) -> Tensor:
    return aten.cat.default([pieces[1], module(pieces[0])], 1)


def filled(pick: Pick, x: Tensor) -> Made:
    """1x1 with a bias, a border of that bias written by slices, kxk without padding, as diverse branches do."""
    if x.ndim != 4:
        raise Unfit(x.shape)
    channels, middle = x.shape[1], pick.of((x.shape[1], 2, 6))
    first = nn.Conv2d(channels, middle, 1)
    parts = nn.ModuleDict({"first": first, "last": nn.Conv2d(middle, channels, 3, bias=pick.of((True, False)))})
    if pick.of((False, True)):
        parts["holder"] = Holder(value=(1, middle, 1, 1))
    other = pick.of((False, False, False, True))

    def border(m: Any, y: Tensor) -> Tensor:
        value = m["holder"].value if other and "holder" in m else m["first"].bias.view(1, -1, 1, 1)
        y = F.pad(y, [1, 1, 1, 1])
        y[:, :, 0:1, :] = value
        y[:, :, -1:, :] = value
        y[:, :, :, 0:1] = value
        y[:, :, :, -1:] = value
        return y

    return Made(lambda m, x: m["last"](border(m, m["first"](x))), parts)


def cat(pick: Pick, x: Tensor, *others: Tensor) -> Made:
    """Values beside each other along the channels, or along another axis."""
    axis = pick.of((1, 1, 1, -1)) if x.ndim > 2 else -1
    return pick.of(
        (
            function(lambda *xs: torch.cat(xs, axis)),
            function(lambda *xs: torch.concat(list(xs), dim=axis)),
            function(lambda *xs: aten.cat.default(list(xs[:2]), axis)),
        )
    )
