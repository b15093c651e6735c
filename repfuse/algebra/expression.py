"""What a region computes from one source, as an expression over the tensors of the model by name.

The planner builds expressions out of geometry alone; weights are read only when one site is evaluated, so a plan
costs no memory and at most one site is ever held in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from repfuse.algebra.affine import Addend, sum_weights
from repfuse.algebra.geometry import Geometry

Tensors = Callable[[str], Tensor]


@dataclass(frozen=True)
class Identity:
    """The source itself."""

    channels: int
    ndim: int

    @property
    def geometry(self) -> Geometry:
        """A 1x1 kernel per channel."""
        return Geometry.identity(self.channels, self.ndim)


@dataclass(frozen=True)
class Convolution:
    """A convolution of the source; ``weight`` and ``bias`` are names of tensors."""

    geometry: Geometry
    weight: str
    bias: str | None


@dataclass(frozen=True)
class Normalisation:
    """A normalisation with frozen statistics, ``y = weight * (x - mean) / sqrt(var + eps) + bias``, by tensor names.

    Source: Ioffe and Szegedy, "Batch Normalization", arXiv 1502.03167, at inference.
    """

    mean: str
    var: str
    weight: str | None
    bias: str | None
    eps: float

    def affine(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """Return (scale, shift), float64 ``[C]``: ``s = weight / sqrt(var + eps)``, ``t = bias - mean * s``."""
        scale = (tensors(self.var).double() + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * tensors(self.weight)
        shift = -tensors(self.mean) * scale
        return scale, shift if self.bias is None else shift + tensors(self.bias)


@dataclass(frozen=True)
class Normalised:
    """A normalisation of an expression."""

    inner: Expression
    by: Normalisation

    @property
    def geometry(self) -> Geometry:
        """The geometry inside: a normalisation is one number per channel."""
        return self.inner.geometry


@dataclass(frozen=True)
class Multiplied:
    """An expression times one number."""

    inner: Expression
    factor: float

    @property
    def geometry(self) -> Geometry:
        """The geometry inside."""
        return self.inner.geometry


@dataclass(frozen=True)
class Sum:
    """A sum of expressions of one source, and its geometry, the union."""

    terms: tuple[Expression, ...]
    geometry: Geometry


Expression = Identity | Convolution | Normalised | Multiplied | Sum


def sum_of(terms: tuple[Expression, ...]) -> Expression:
    """Return the sum. Raises NotAffine where the terms are no single convolution."""
    geometry = terms[0].geometry
    for term in terms[1:]:
        geometry = geometry.add(term.geometry)
    return terms[0] if len(terms) == 1 else Sum(terms, geometry)


def evaluate(expression: Expression, tensors: Tensors, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the fused map: computed in float64, rounded once to the dtype of ``like``."""
    bias = torch.zeros(expression.geometry.out_channels, dtype=torch.float64, device=like.device)
    addends = list(_addends(expression, tensors, None, bias))
    weight = torch.empty(expression.geometry.weight_shape, dtype=like.dtype, device=like.device)
    sum_weights(expression.geometry, addends, weight)
    return weight, bias.to(like.dtype)


def _addends(expression: Expression, tensors: Tensors, scale: Tensor | None, bias: Tensor) -> Iterator[Addend]:
    """Yield the weights of ``scale * expression`` and add its constants to ``bias``: scales go down the tree, so every
    weight is touched once."""
    match expression:
        case Identity():
            ones = torch.ones(expression.geometry.weight_shape, dtype=torch.float64, device=bias.device)
            yield Addend(expression.geometry, ones, scale)
        case Convolution(geometry, weight_name, bias_name):
            yield Addend(geometry, tensors(weight_name), scale)
            if bias_name is not None:
                bias += _times(scale, tensors(bias_name).double())
        case Normalised(inner, normalisation):
            own, shift = normalisation.affine(tensors)
            bias += _times(scale, shift)
            yield from _addends(inner, tensors, _times(scale, own), bias)
        case Multiplied(inner, factor):
            yield from _addends(inner, tensors, _times(scale, torch.full_like(bias, factor)), bias)
        case Sum(terms):
            for term in terms:
                yield from _addends(term, tensors, scale, bias)


def _times(scale: Tensor | None, values: Tensor) -> Tensor:
    return values if scale is None else scale * values


def convolutions(expression: Expression) -> Iterator[Convolution]:
    """Yield the convolutions in the expression."""
    match expression:
        case Convolution():
            yield expression
        case Normalised(inner) | Multiplied(inner):
            yield from convolutions(inner)
        case Sum(terms):
            for term in terms:
                yield from convolutions(term)


def tensor_names(expression: Expression) -> Iterator[str]:
    """Yield the name of every tensor that the expression reads."""
    match expression:
        case Convolution(_, weight, bias):
            yield from (name for name in (weight, bias) if name is not None)
        case Normalised(inner, by):
            yield from tensor_names(inner)
            yield from (name for name in (by.mean, by.var, by.weight, by.bias) if name is not None)
        case Multiplied(inner):
            yield from tensor_names(inner)
        case Sum(terms):
            for term in terms:
                yield from tensor_names(term)


def branches(expression: Expression) -> tuple[str, ...]:
    """Describe each branch of the sum for people, such as ``conv 3x3 + norm``."""
    match expression:
        case Sum(terms):
            return tuple(name for term in terms for name in branches(term))
        case Normalised(Sum() as inner):
            return tuple(f"{name} (norm after the sum)" for name in branches(inner))
        case Normalised(inner):
            return (f"{branches(inner)[0]} + norm",)
        case Multiplied(inner, factor):
            return tuple(f"{factor:g} * {name}" for name in branches(inner))
        case Convolution(geometry):
            return (f"conv {geometry.describe()}",)
        case Identity():
            return ("skip",)
