"""The fused weights in float64, computed from the original's one site at a time, when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from repfuse.algebra.evaluation import Tensors, constant, evaluate
from repfuse.algebra.expression import Expression
from repfuse.errors import RepfuseError
from repfuse.networks import named_tensors
from repfuse.plans import AGAIN
from repfuse.proof.places import Place
from repfuse.recording.constants import lookup
from repfuse.rewriting.emit import without_padding
from repfuse.verifying.copies import in_float64
from repfuse.verifying.widening import Change


class Weight(NamedTuple):
    """A stored tensor of a fused convolution, and what computes it in float64."""

    stored: torch.Tensor
    exact: Callable[[], torch.Tensor]


class ExactWeights:
    """What the weights of a fused network would be without rounding.

    Those stored in float64 are taken as they are: they are themselves what has to be proven.
    """

    def __init__(self, fused: nn.Module, places: Iterable[Place]) -> None:
        self._of_place = {place.path: list(_weights(fused, place)) for place in places}
        self._by_id = {id(weight.stored): weight for weights in self._of_place.values() for weight in weights}

    def at(self, place: Place) -> list[Weight]:
        """Return the weights and biases of the convolutions that replace a region."""
        return self._of_place[place.path]

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._by_id

    def change(self, network: nn.Module) -> Change:
        """Return what makes the tensors of ``network``, which holds fused convolutions, exact as they are read."""
        narrow = {
            name: self._by_id[id(x)].exact
            for name, x in named_tensors(network)
            if id(x) in self._by_id and x.dtype is not torch.float64
        }
        return lambda name, tensor: narrow[name]() if name in narrow else in_float64(name, tensor)


def _weights(fused: nn.Module, place: Place) -> Iterator[Weight]:
    tensors = lookup(place.module, place.planner.recording.constants)
    for group in place.region.groups:
        if id(group) in place.path_of:
            path = place.path_of[id(group)]
            convolution = convolution_at(fused, path)
            for name, compute in (("weight", _weight), ("bias", constant)):
                if name not in convolution._parameters:  # a parametrization computes it
                    raise _misfit(path)
                stored = convolution._parameters[name]
                if stored is not None:  # a missing bias is not the one that was computed: what is compared shows it
                    yield Weight(stored, partial(compute, group.expression, tensors, stored.device))


def _weight(expression: Expression, tensors: Tensors, device: torch.device) -> torch.Tensor:
    return evaluate(expression, tensors, torch.empty(0, dtype=torch.float64, device=device))[0]


def convolution_at(fused: nn.Module, path: str) -> nn.Module:
    """Return the convolution or linear layer of a site: behind its padding, where that is a module apart.

    Raises RepfuseError where there is none.
    """
    try:
        found = without_padding(fused.get_submodule(path))
    except AttributeError as error:
        raise _misfit(path) from error
    if not isinstance(found, _ConvNd | nn.Linear):
        raise _misfit(path)
    return found


def _misfit(path: str) -> RepfuseError:
    return RepfuseError("The plan does not fit the fused network.", f"It has no convolution at {path!r}.", AGAIN)
