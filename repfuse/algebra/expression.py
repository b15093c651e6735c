"""What a region computes from one source, as an expression over the tensors of the model by name.

The planner builds expressions out of geometry alone; weights are read only when one site is evaluated, so a plan
costs no memory and at most one site is ever held in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce

from repfuse.algebra.geometry import Geometry, Ints
from repfuse.algebra.layers import Channelwise, Convolution, Factor, Filter, Layer, Normalisation, Offset, Windows


@dataclass(frozen=True)
class Identity:
    """The source itself, of ``channels`` channels and ``ndim`` spatial axes."""

    channels: int
    ndim: int

    @property
    def geometry(self) -> Geometry:
        """A 1x1 kernel per channel."""
        return Geometry.identity(self.channels, self.ndim)


@dataclass(frozen=True)
class Through:
    """A layer applied to an expression."""

    inner: Expression
    layer: Layer
    geometry: Geometry


@dataclass(frozen=True)
class Scaled:
    """An expression, each channel times a number, plus a number."""

    inner: Expression
    by: Channelwise

    @property
    def geometry(self) -> Geometry:
        """The geometry inside: nothing moves between pixels or channels."""
        return self.inner.geometry


@dataclass(frozen=True)
class Chosen:
    """The channels ``indices`` of an expression, in this order."""

    inner: Expression
    indices: Ints
    geometry: Geometry


@dataclass(frozen=True)
class Joined:
    """The channels of several expressions, one after the other."""

    parts: tuple[Expression, ...]
    geometry: Geometry


@dataclass(frozen=True)
class Sum:
    """A sum of expressions of one source, and its geometry, the union."""

    terms: tuple[Expression, ...]
    geometry: Geometry


Expression = Identity | Through | Scaled | Chosen | Joined | Sum


def through(inner: Expression, layer: Layer) -> Expression:
    """Return the layer after the expression. Raises NotAffine where they are no single convolution.

    Where ``inner.geometry.borders_show(layer.geometry)``, it is one only if the constant of ``inner`` is what the layer
    pads with; that takes the weights (``evaluation.constant``).
    """
    geometry = layer.geometry if isinstance(inner, Identity) else inner.geometry.then(layer.geometry)
    return _settled(Through(inner, layer, geometry))


def chosen(inner: Expression, indices: Ints) -> Expression:
    """Return these channels of the expression."""
    return _settled(Chosen(inner, indices, inner.geometry.select(indices)))


def joined(parts: tuple[Expression, ...]) -> Expression:
    """Return the channels of all parts. Raises NotAffine where they are no single convolution."""
    return _settled(Joined(parts, Geometry.stacked([part.geometry for part in parts])))


def sum_of(terms: tuple[Expression, ...]) -> Expression:
    """Return the sum. Raises NotAffine where the terms are no single convolution."""
    if len(terms) == 1:
        return terms[0]
    return _settled(Sum(terms, reduce(Geometry.add, (term.geometry for term in terms))))


def _settled(expression: Through | Chosen | Joined | Sum) -> Expression:
    """Give an expression in which channels are moved as many groups as it really has."""
    if not _moves_channels(expression):
        return expression
    return replace(expression, geometry=replace(expression.geometry, groups=_windows(expression).groups()))


def _moves_channels(expression: Expression) -> bool:
    return isinstance(expression, Chosen | Joined) or any(map(_moves_channels, _inside(expression)))


def _windows(expression: Expression) -> Windows:
    """Return which channels of the source each output channel reads."""
    match expression:
        case Identity():
            return Windows.of(expression.geometry)
        case Through(inner, layer):
            return _windows(inner).then(Windows.of(layer.geometry))
        case Scaled(inner):
            return _windows(inner)
        case Chosen(inner, indices):
            return _windows(inner).select(indices)
        case Joined(parts):
            return Windows.concat([_windows(part) for part in parts])
        case Sum(terms):
            return reduce(Windows.union, map(_windows, terms))


def relaid(expression: Expression, channels: int, ndim: int) -> Expression:
    """Return an expression that is the source times numbers as one of ``ndim`` spatial axes; any other as it is.

    Until it meets a layer, nothing says where a source has its channels.
    """
    match expression:
        case Identity():
            return Identity(channels, ndim)
        case Scaled(inner, Factor(float())):
            return replace(expression, inner=relaid(inner, channels, ndim))
        case _:
            return expression


def multiple_of_source(expression: Expression) -> float | None:
    """Return the number that an expression multiplies its source by, if it does nothing else."""
    match expression:
        case Identity():
            return 1.0
        case Scaled(inner, Factor(float() as by, False)):
            inside = multiple_of_source(inner)
            return None if inside is None else by * inside
        case _:
            return None


def channels_read(expression: Expression) -> Ints | None:
    """Return the channels of the source that the expression chooses before all else, where all of it chooses these.

    None as well where it chooses one of them twice, which then reads the sum of two columns of the weight.
    """
    match expression:
        case Chosen(Identity(), indices):
            return indices if len(set(indices)) == len(indices) else None
        case Through(inner) | Scaled(inner):
            return channels_read(inner)
        case Sum(terms):
            (first, *others) = {channels_read(term) for term in terms}
            return None if others else first
        case _:
            return None


def of_channels_read(expression: Expression) -> Expression:
    """Return the expression as one of a source that has just ``channels_read``."""
    match expression:
        case Chosen(Identity(_, ndim), indices):
            return Identity(len(indices), ndim)
        case Through(inner, layer):
            return through(of_channels_read(inner), layer)
        case Scaled(inner, by):
            return Scaled(of_channels_read(inner), by)
        case Sum(terms):
            return sum_of(tuple(map(of_channels_read, terms)))
        case _:
            raise AssertionError("the expression chooses no channels")


def _inside(expression: Expression) -> tuple[Expression, ...]:
    match expression:
        case Through(inner) | Scaled(inner) | Chosen(inner):
            return (inner,)
        case Joined(several) | Sum(several):
            return several
        case _:
            return ()


def layers(expression: Expression) -> Iterator[Layer]:
    """Yield the layers in the expression."""
    for inner in _inside(expression):
        yield from layers(inner)
    if isinstance(expression, Through):
        yield expression.layer


def convolutions(expression: Expression) -> Iterator[Convolution]:
    """Yield the convolutions in the expression."""
    return (layer for layer in layers(expression) if isinstance(layer, Convolution))


def is_unshifted(expression: Expression) -> bool:
    """Whether the expression adds nothing to what it computes from its source, whatever the weights."""
    match expression:
        case Scaled(_, Normalisation(str()) | Normalisation(bias=str()) | Offset()):
            return False
        case Through(_, Convolution(_, _, str())):
            return False
        case _:
            return all(map(is_unshifted, _inside(expression)))


def tensor_names(expression: Expression) -> Iterator[str]:
    """Yield the name of every tensor that the expression reads."""
    for inner in _inside(expression):
        yield from tensor_names(inner)
    match expression:
        case Through(_, Convolution(_, weight, bias)):
            names: tuple[object, ...] = (weight, bias)
        case Through(_, Filter(_, _, fill)):
            names = (fill,)
        case Scaled(_, Normalisation(mean, var, weight, bias)):
            names = (mean, var, weight, bias)
        case Scaled(_, Factor(by) | Offset(by)):
            names = (by,)
        case _:
            names = ()
    yield from (name for name in names if isinstance(name, str))
