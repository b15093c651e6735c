"""Fused maps as modules: the plainest stock module that computes them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from repfuse.affine import AffineConv
from repfuse.cost import needs_separate_pad
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError

_CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_PADS: dict[int, type[nn.Module]] = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}


def convolution_module(map_: AffineConv, sample: Tensor) -> nn.Module:
    """Return a convolution that computes ``map_`` in the dtype, device and memory format of the weight ``sample``.

    Padding is written as explicit integers; padding that differs before and after takes a module of its own.
    """
    geometry = map_.geometry
    apart = needs_separate_pad(geometry)
    convolution = _CONVOLUTIONS[geometry.ndim](
        geometry.in_channels,
        geometry.out_channels,
        geometry.kernel,
        geometry.stride,
        0 if apart else tuple(before for before, _ in geometry.padding),
        geometry.dilation,
        geometry.groups,
        padding_mode=geometry.padding_mode,
        device="meta",
    )
    write_weights(convolution, map_, sample)
    if not apart:
        return convolution
    amounts = tuple(amount for pair in reversed(geometry.padding) for amount in pair)
    return nn.Sequential(OrderedDict(pad=_PADS[geometry.ndim](amounts), conv=convolution))


def write_weights(convolution: nn.Module, map_: AffineConv, sample: Tensor) -> None:
    """Give ``convolution`` the weight and bias of ``map_``, rounded once, to the dtype of ``sample``."""
    weight = _rounded(map_.weight, sample)
    if sample.dim() == 4 and _channels_last(sample) and not _channels_last(weight):
        weight = weight.contiguous(memory_format=torch.channels_last)
    convolution.weight = nn.Parameter(weight, sample.requires_grad)
    convolution.bias = nn.Parameter(_rounded(map_.bias, sample), sample.requires_grad)


def _channels_last(tensor: Tensor) -> bool:
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _rounded(exact: Tensor, sample: Tensor) -> Tensor:
    """Cast to the dtype of ``sample``. Raises RepfuseError where a finite number becomes infinite."""
    rounded = exact.to(sample.dtype)
    if rounded.numel() and not torch.isfinite(torch.stack(torch.aminmax(rounded))).all() and exact.isfinite().all():
        raise RepfuseError(
            f"A fused weight does not fit into {str(sample.dtype).removeprefix('torch.')}.",
            f"Its largest value is {exact.abs().max():.3g}; the range of the format ends below that.",
            "Convert the checkpoint in a format of larger range, such as bfloat16 or float32.",
            EXIT_FAILED_CHECK,
        )
    return rounded


def graph_module(owner: nn.Module, graph: fx.Graph, made: dict[str, nn.Module], kept: Iterable[str]) -> fx.GraphModule:
    """Return ``graph`` as a module named like ``owner``, whose children it calls; ``made`` are new children."""
    for name, module in made.items():
        setattr(owner, name, module)
    body = fx.GraphModule(owner, copy.deepcopy(graph), class_name=type(owner).__name__)
    for path in kept:
        _keep(owner.get_submodule(path), body, path)
    return body


def _keep(module: nn.Module, body: fx.GraphModule, path: str) -> None:
    """Register the tensors that ``module`` itself holds at ``path`` of ``body``."""
    holder: nn.Module = body
    for name in path.split(".") if path else ():
        if not hasattr(holder, name):
            holder.add_module(name, nn.Module())
        holder = getattr(holder, name)
    for key, parameter in module._parameters.items():
        if not hasattr(holder, key):
            holder.register_parameter(key, parameter)
    for key, buffer in module._buffers.items():
        if not hasattr(holder, key):
            holder.register_buffer(key, buffer, key not in module._non_persistent_buffers_set)


_PLAIN = (bool, int, float, str, bytes, type(None))


def keep_plain_attributes(owner: nn.Module, body: nn.Module) -> None:
    """Copy what an owner carries as plain data: other parts of a model read it (``layer.f`` in YOLO)."""
    for name, value in vars(owner).items():
        if not name.startswith("_") and _is_plain(value) and not hasattr(body, name):
            setattr(body, name, value)


def _is_plain(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    return type(value) in _PLAIN
