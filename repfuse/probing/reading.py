"""Modules as kernels: their tensors and settings, by plain attribute access."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from repfuse.probing.axes import Axis, Pad, Spread, Window
from repfuse.probing.box import Refused
from repfuse.probing.kernel import Kernel

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MODES: dict[type[nn.Module], str] = {
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), "zeros"),
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d), "reflect"),
    **dict.fromkeys((nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d), "replicate"),
    **dict.fromkeys((nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d), "circular"),
}


def kernel_of(module: nn.Module, ndim: int) -> Kernel:
    """Return the kernel of a convolution, a transposed one or a linear layer, with pads in a Sequential before it.

    ``ndim`` is the number of axes besides batch and channels: a linear layer has one tap on each. Raises Refused for
    another module.
    """
    *before, layer = module if isinstance(module, nn.Sequential) else [module]
    pads = _pads(before, ndim)
    if isinstance(layer, nn.Linear) and _is_stock(layer, nn.Linear):
        return _kernel(layer, layer.weight.reshape(*layer.weight.shape, *[1] * ndim), (Window(1),) * ndim, 1)
    if isinstance(layer, _CONVOLUTIONS) and any(_is_stock(layer, kind) for kind in _CONVOLUTIONS):
        return _kernel(layer, layer.weight, tuple(_windows(layer, pads)), layer.groups)
    if isinstance(layer, _TRANSPOSED) and any(_is_stock(layer, kind) for kind in _TRANSPOSED) and not before:
        return _kernel(layer, _outputs_first(layer), tuple(_spreads(layer)), layer.groups)
    raise Refused(f"{type(module).__name__} is no layer that can be read")


def scaling(factor: float, channels: int, ndim: int) -> Kernel:
    """Return the kernel of ``factor * x``."""
    weight = torch.full((channels, 1, *[1] * ndim), factor, dtype=torch.float64)
    return Kernel(weight, weight.new_zeros(channels), (Window(1),) * ndim, channels)


def _is_stock(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a class computes what ``kind`` does: a subclass may add to a forward what its settings do not say."""
    names = ("forward", "_conv_forward", "__call__")
    own = type(layer)
    return issubclass(own, kind) and all(getattr(own, name, None) is getattr(kind, name, None) for name in names)


def _kernel(layer: Any, weight: Tensor, axes: tuple[Axis, ...], groups: int) -> Kernel:
    weight = weight.detach().cpu()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().cpu()
    return Kernel(weight.double(), bias.double(), axes, groups)


def _pads(modules: list[nn.Module], ndim: int) -> list[tuple[Pad, ...]]:
    """Return the pads of each axis, in the order in which they are applied."""
    found: list[list[Pad]] = [[] for _ in range(ndim)]
    for module in modules:
        mode = _MODES.get(type(module))
        if mode is None:
            raise Refused(f"{type(module).__name__} is no padding")
        amounts: tuple[int, ...] = module.padding  # type: ignore[assignment]
        for axis in range(ndim):  # from the last axis to the first
            found[ndim - 1 - axis].append(Pad(amounts[2 * axis], amounts[2 * axis + 1], mode))
    return [tuple(pads) for pads in found]


def _windows(layer: Any, pads: list[tuple[Pad, ...]]) -> Iterator[Window]:
    for axis, kernel in enumerate(layer.kernel_size):
        reach = layer.dilation[axis] * (kernel - 1)
        if isinstance(layer.padding, str):
            before, after = (reach // 2, reach - reach // 2) if layer.padding == "same" else (0, 0)
        else:
            before = after = layer.padding[axis]
        own = Pad(before, after, layer.padding_mode)
        yield Window(kernel, layer.stride[axis], layer.dilation[axis], (*pads[axis], own))


def _spreads(layer: Any) -> Iterator[Spread]:
    for axis, kernel in enumerate(layer.kernel_size):
        before, dilation = layer.padding[axis], layer.dilation[axis]
        growth = dilation * (kernel - 1) + 1 + layer.output_padding[axis] - 2 * before
        yield Spread(kernel, layer.stride[axis], before, growth, dilation)


def _outputs_first(layer: Any) -> Tensor:
    """Return the weight ``[in, out / groups, *taps]`` as ``[out, in / groups, *taps]``."""
    weight: Tensor = layer.weight
    by_group = weight.reshape(layer.groups, -1, *weight.shape[1:])
    return by_group.transpose(1, 2).flatten(0, 1)
