"""Fused maps as modules: the plainest stock module that computes them."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, jit, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repfuse.algebra.evaluation import Tensors, behind_norm, evaluate
from repfuse.algebra.expression import Expression, tensor_names
from repfuse.algebra.geometry import Geometry
from repfuse.algebra.transposed import TransposedGeometry
from repfuse.errors import EXIT_FAILED_CHECK, RepfuseError
from repfuse.networks import is_plain
from repfuse.planning.cost import needs_separate_pad
from repfuse.planning.storage import left_range

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORMS: tuple[type[_BatchNorm], ...] = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PADS: dict[str, tuple[type[nn.Module], ...]] = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Memory formats by number of axes of the weight."""


def convolution_module(geometry: Geometry) -> nn.Module:
    """Return a convolution of ``geometry`` without data, or a linear layer where it has no spatial axes.

    Padding is in explicit integers, 0 where it is a module apart.
    """
    if not geometry.ndim:
        return nn.Linear(geometry.in_channels, geometry.out_channels, device="meta")
    if isinstance(geometry, TransposedGeometry):
        return _transposed_module(geometry)
    apart = needs_separate_pad(geometry)
    convolution: nn.Module = _CONVOLUTIONS[geometry.ndim](
        geometry.in_channels,
        geometry.out_channels,
        geometry.kernel,
        geometry.stride,
        0 if apart else tuple(before for before, _ in geometry.padding),
        geometry.dilation,
        geometry.groups,
        padding_mode="zeros" if apart else geometry.padding_mode,
        device="meta",
    )
    return convolution


def _transposed_module(geometry: TransposedGeometry) -> nn.Module:
    convolution: nn.Module = _TRANSPOSED[geometry.ndim](
        geometry.in_channels,
        geometry.out_channels,
        geometry.kernel,
        geometry.stride,
        tuple(before for before, _ in geometry.padding),
        geometry.output_padding,
        geometry.groups,
        dilation=geometry.dilation,
        device="meta",
    )
    return convolution


def norm_module(geometry: Geometry) -> _BatchNorm:
    """Return a BatchNorm behind a convolution of ``geometry``, without data."""
    return _NORMS[geometry.ndim](geometry.out_channels, device="meta")


def with_neighbours(convolution: nn.Module, geometry: Geometry, norm: _BatchNorm | None) -> nn.Module:
    """Return the convolution, behind a padding or a crop of its own where it cannot do that itself, before the norm."""
    steps: list[tuple[str, nn.Module]] = []
    if needs_separate_pad(geometry):
        kind = _PADS[geometry.padding_mode][geometry.ndim - 1]
        both = zip(("pad", "crop"), geometry.pad_then_crop, strict=True)
        steps = [(name, kind(part)) for name, part in both if any(part)]
    behind = [("norm", norm)] if norm is not None else []
    return nn.Sequential(OrderedDict([*steps, ("conv", convolution), *behind])) if steps or behind else convolution


def without_neighbours(module: nn.Module) -> nn.Module:
    """Return the convolution of a module that ``with_neighbours`` made, and any other module as it is."""
    padded = isinstance(module, nn.Sequential) and "conv" in module._modules
    return module.get_submodule("conv") if padded else module


FOLDED_BY_HOST = ("forward_fuse", "fuseforward")
"""The forward without ``bn`` of layers that their library folds itself, whatever ``bn`` is: ultralytics and YOLOv5 and
6; YOLOX and YOLOv7."""


def folded_norm(mean: Tensor | None, owners: Iterable[nn.Module]) -> nn.Module:
    """Return what takes the place of a folded normalisation with this running mean: nothing to do.

    Some libraries fold what is left once more before they run or export a network, by its numbers and not by its class:
    for them it has numbers that change nothing, which are no part of the state dict.
    """
    nothing: Any = nn.Identity()
    folds = any(hasattr(owner, method) for owner in owners for method in FOLDED_BY_HOST)
    if mean is not None and folds:
        nothing.eps = 0.0
        for name, value in (("running_mean", 0), ("running_var", 1), ("weight", 1), ("bias", 0)):
            nothing.register_buffer(name, torch.full_like(mean, value), persistent=False)
    return nothing  # type: ignore[no-any-return]


def write_weights(
    convolution: nn.Module, norm: _BatchNorm | None, expression: Expression, tensors: Tensors, like: Tensor
) -> None:
    """Give ``convolution`` the weight and bias of the map, with dtype, device and memory format of the weight ``like``;
    and ``norm`` what it multiplies and adds, with statistics that change nothing.

    Raises RepfuseError where a finite number becomes infinite in that dtype.
    """
    bias: Tensor | None
    if norm is None:
        weight, bias = evaluate(expression, tensors, like)
        made = [weight, bias]
    else:
        mean, var = _clear_norm(norm, expression.geometry, like)
        made = [x.to(like.dtype) for x in behind_norm(expression, tensors, mean, var, norm.eps)]
        weight, bias = made[0], None if convolution.bias is None else torch.zeros_like(mean)
        norm.weight, norm.bias = (nn.Parameter(x, like.requires_grad) for x in made[1:])
    if left_range(made, map(tensors, tensor_names(expression))):
        raise RepfuseError(
            f"A fused weight does not fit into {str(like.dtype).removeprefix('torch.')}.",
            "The plan was made with other weights; of these, a product leaves the range of the format.",
            "Make the plan again with these weights, or convert in bfloat16 or float32.",
            EXIT_FAILED_CHECK,
        )
    _set_parameters(convolution, weight, bias, like)


def _clear_norm(norm: _BatchNorm, geometry: Geometry, like: Tensor) -> tuple[Tensor, Tensor]:
    """Give ``norm`` statistics that change nothing, which are returned, and other numbers that mean nothing yet."""
    mean = torch.zeros(geometry.out_channels, dtype=like.dtype, device=like.device)
    var = torch.ones_like(mean)
    norm.running_mean, norm.running_var = mean, var
    norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=like.device)
    norm.weight, norm.bias = (nn.Parameter(torch.empty_like(mean), like.requires_grad) for _ in range(2))
    return mean, var


def leave_unset(convolution: nn.Module, norm: _BatchNorm | None, geometry: Geometry, like: Tensor) -> None:
    """Give ``convolution``, and ``norm``, tensors of the right shapes whose numbers mean nothing yet."""
    if norm is not None:
        _clear_norm(norm, geometry, like)
    assert isinstance(convolution.weight, Tensor)
    weight = torch.empty(convolution.weight.shape, dtype=like.dtype, device=like.device)
    bias = None if norm is not None and convolution.bias is None else weight.new_empty(geometry.out_channels)
    _set_parameters(convolution, weight, bias, like)


def _set_parameters(convolution: nn.Module, weight: Tensor, bias: Tensor | None, like: Tensor) -> None:
    """Give ``convolution`` these tensors, trained or not as ``like`` is, and in its memory format."""
    channels_last = _CHANNELS_LAST.get(like.dim())
    if channels_last and not like.is_contiguous() and like.is_contiguous(memory_format=channels_last):
        weight = weight.contiguous(memory_format=channels_last)
    convolution.weight = nn.Parameter(weight, like.requires_grad)
    convolution.register_parameter("bias", None if bias is None else nn.Parameter(bias, like.requires_grad))


def graph_module(owner: nn.Module, graph: fx.Graph, made: dict[str, nn.Module], kept: Iterable[str]) -> fx.GraphModule:
    """Return ``graph`` as a module named like ``owner``, whose children it calls; ``made`` are new children."""
    for name, module in made.items():
        setattr(owner, name, module)
    body = fx.GraphModule(owner, copy.deepcopy(graph), class_name=type(owner).__name__)
    for name in kept:
        _keep(owner, body, name)
    body._non_persistent_buffers_set |= owner._non_persistent_buffers_set & body._buffers.keys()
    for table in ("_parameters", "_buffers", "_modules"):
        _in_order(getattr(body, table), list(getattr(owner, table)))
    for path, module in body.named_modules():
        if type(module) is nn.Module:  # what torch.fx puts around children that are called one by one
            module.training = owner.get_submodule(path).training
    return body


def _in_order(table: dict[str, Any], names: list[str]) -> None:
    """Put the entries of a table in the order of the owner's, so that ``state_dict`` keeps its order."""
    for name in [*(name for name in names if name in table), *(name for name in table if name not in names)]:
        table[name] = table.pop(name)


def _keep(owner: nn.Module, body: nn.Module, name: str) -> None:
    """Register the tensor ``name`` of ``owner`` under the same name in ``body``.

    A module that is rewritten already, in another place where it also stands, may no longer have it: then that module.
    """
    first, _, rest = name.partition(".")
    if not rest:
        _keep_own(owner, body, first)
        return
    child = owner._modules[first]
    assert child is not None
    if isinstance(child, jit.ScriptModule):  # of which nothing can stand alone
        body.add_module(first, child)
        return
    if first not in body._modules:
        body.add_module(first, nn.Module() if _has(child, rest) else child)
    if body._modules[first] is not child:
        _keep(child, body.get_submodule(first), rest)


def _has(module: nn.Module, name: str) -> bool:
    first, _, rest = name.partition(".")
    if not rest:
        return hasattr(module, first)
    child = getattr(module, first, None)  # the table of a script's modules is no dict
    return isinstance(child, nn.Module) and _has(child, rest)


def _keep_own(module: nn.Module, holder: nn.Module, leaf: str) -> None:
    if leaf in module._parameters:
        holder.register_parameter(leaf, module._parameters[leaf])
    elif leaf in module._buffers:
        holder.register_buffer(leaf, module._buffers[leaf], leaf not in module._non_persistent_buffers_set)
    elif hasattr(module, leaf):
        setattr(holder, leaf, getattr(module, leaf))


_PRESERVED = "_user_preserved_attributes"
"""Under this key in its ``meta`` a GraphModule has the attributes that PyTorch takes along when it is deep-copied."""


def keep_plain_attributes(owner: nn.Module, body: nn.Module) -> None:
    """Copy what an owner and its class carry as plain data: others read it (``layer.f`` in YOLO, ``model.names``)."""
    classes = itertools.takewhile(lambda kind: kind is not nn.Module, type(owner).__mro__)
    tables = [vars(owner), *map(vars, classes)]
    found = {name: value for table in reversed(tables) for name, value in table.items() if not name.startswith("_")}
    kept = {name: value for name, value in found.items() if is_plain(value) and not hasattr(body, name)}
    for name, value in kept.items():
        setattr(body, name, value)
    if isinstance(body, fx.GraphModule):
        body.meta[_PRESERVED] = kept
