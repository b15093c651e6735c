"""Plain convolutions in the place of modules that cannot be traced.

What such a module computes is read off its answers alone (see ``repfuse.probing``), in float64. With the stand-ins in
place the model is traced, planned and rewritten as any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from repfuse.algebra.geometry import Geometry
from repfuse.errors import RepfuseError
from repfuse.networks import device_of, holders, join, named_tensors, own_tensors
from repfuse.plans import AGAIN, Probed
from repfuse.probing import Recovered, Refused, recover
from repfuse.probing.compacting import compact
from repfuse.probing.evidence import Evidence
from repfuse.rewriting.emit import convolution_module, leave_unset, set_parameters, with_padding, without_padding
from repfuse.tracing.leaves import is_stock
from repfuse.verifying.copies import as_stored, copy_with, in_float64
from repfuse.verifying.widening import Widening


@dataclass(frozen=True)
class StandIn:
    """A convolution for a module: its settings, its weight and bias in float64, and why they are believed."""

    probed: Probed
    weight: Tensor
    bias: Tensor
    evidence: Evidence

    @property
    def geometry(self) -> Geometry:
        """The settings as the rewriting takes them."""
        return geometry_of(self.probed)


@dataclass(frozen=True)
class Opened:
    """A model with stand-ins in it; itself, where there are none.

    ``exact`` are their tensors by name, in float64: those in the model are these, rounded. ``refused`` says by path why
    other modules have no stand-in.
    """

    module: nn.Module
    stand_ins: tuple[StandIn, ...] = ()
    exact: Mapping[str, Tensor] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def probed(self) -> tuple[Probed, ...]:
        """What a plan keeps of the stand-ins."""
        return tuple(stand_in.probed for stand_in in self.stand_ins)

    def unrounded(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the model in float64, as it was before it was rounded."""
        return self.exact[name] if name in self.exact else in_float64(name, tensor)


def opened(module: nn.Module, probed: Iterable[Probed], *, weights: bool = True) -> Opened:
    """Return a model with the stand-ins that a plan names, read off its modules again; those in place stay.

    Without ``weights`` they are left unset, for who loads them next. Raises RepfuseError where a module is another one.
    """
    missing = [one for one in probed if not _is_in_place(module, one)]
    if not missing:
        return Opened(module)
    if weights:
        return put(module, [_read_again(module, one) for one in missing])
    copied = copy_with(module, as_stored)
    for one in missing:
        block = copied.get_submodule(one.path)
        geometry = geometry_of(one)
        convolution = convolution_module(geometry)
        leave_unset(convolution, geometry, _like(block, copied))
        _replace(copied, block, with_padding(convolution, geometry))
    return Opened(copied)


def put(module: nn.Module, stand_ins: Iterable[StandIn]) -> Opened:
    """Return a copy of a model with these in the place of its modules."""
    copied, done = copy_with(module, as_stored), tuple(stand_ins)
    exact: dict[str, Tensor] = {}
    for one in done:
        block = copied.get_submodule(one.probed.path)
        like = _like(block, copied)
        convolution = convolution_module(one.geometry)
        set_parameters(convolution, one.weight.to(like), one.bias.to(like), like)
        made = with_padding(convolution, one.geometry)
        _replace(copied, block, made)
        within = join(one.probed.path, "" if made is convolution else "conv")
        exact |= {join(within, "weight"): one.weight, join(within, "bias"): one.bias}
    return Opened(copied, done, exact)


def read(block: nn.Module, path: str, channels: int, ndim: int) -> StandIn:
    """Return the stand-in for a module that is called with ``[N, channels, *size]``. Raises Refused: there is none."""
    wide = copy_with(block, in_float64)
    device = device_of(wide)

    def run(x: Tensor) -> Any:
        given = x.to(device)
        with Widening((given,), {}, in_float64):
            return wide(given)

    return _stand_in(path, recover(run, channels, ndim))


def geometry_of(probed: Probed) -> Geometry:
    """Return the settings of a stand-in as the rewriting takes them."""
    sizes = (probed.in_channels, probed.out_channels, probed.kernel, probed.stride)
    return Geometry(*sizes, probed.padding, probed.dilation, probed.groups)


def _stand_in(path: str, found: Recovered) -> StandIn:
    if found.transposed:
        raise Refused("it spreads its input: it is a transposed convolution")
    small = compact(found.weight)
    out, into, *_ = found.weight.shape
    kernel = tuple(small.weight.shape[2:])
    probed = Probed(path, into, out, kernel, found.stride, found.padding, small.dilation, small.groups)
    return StandIn(probed, small.weight, found.bias, found.evidence)


def _read_again(module: nn.Module, probed: Probed) -> StandIn:
    try:
        found = read(module.get_submodule(probed.path), probed.path, probed.in_channels, len(probed.kernel))
    except (Refused, AttributeError) as error:
        raise _misfit(probed, f"{error}.") from error
    if found.probed != probed:
        raise _misfit(probed, "Its answers are those of another convolution than the plan says.")
    return found


def _misfit(probed: Probed, why: str) -> RepfuseError:
    return RepfuseError(f"The plan does not fit the module {probed.path!r}, which it replaces.", why, AGAIN)


def _is_in_place(module: nn.Module, probed: Probed) -> bool:
    """Whether the module at the path is the convolution already: what cannot be traced is no stock layer."""
    try:
        there = module.get_submodule(probed.path)
    except AttributeError as error:
        raise _misfit(probed, "There is no such module.") from error
    layer = without_padding(there)
    weight = own_tensors(layer).get("weight")
    return is_stock(layer) and weight is not None and tuple(weight.shape) == geometry_of(probed).weight_shape


def _like(block: nn.Module, model: nn.Module) -> Tensor:
    """Return the tensor that the new weight is stored like: the largest of the module, or else of the model."""
    for owner in (block, model):
        floating = [tensor for _, tensor in named_tensors(owner) if tensor.is_floating_point()]
        if floating:
            return max(floating, key=Tensor.numel)
    return torch.zeros(())


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is registered."""
    new.train(old.training)
    for parent, name in holders(model)[old]:
        setattr(parent, name, new)
