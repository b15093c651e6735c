"""What a region computes from one source, as an expression over the tensors of the model by name.

The planner builds expressions out of geometry alone; weights are read only when one site is evaluated, so a plan
costs no memory and at most one site is ever held in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

from repfuse.algebra.geometry import Geometry, Ints, NotAffine
from repfuse.algebra.layers import (
    Channelwise,
    Convolution,
    Factor,
    Filter,
    Layer,
    Normalisation,
    Offset,
    Phases,
    Windows,
)


@dataclass(frozen=True)
class Identity:
    """The source itself, of ``channels`` channels and ``ndim`` spatial axes."""

    channels: int
    ndim: int
    has_ones = convolves = False
    tensor_names: ClassVar[tuple[str, ...]] = ()

    @property
    def geometry(self) -> Geometry:
        """A 1x1 kernel per channel."""
        return Geometry.identity(self.channels, self.ndim)


Operand = TypeVar("Operand")


class Operation(Generic[Operand]):
    """What is done with operands: nodes of a graph where it says what one node computes, expressions in an expression.

    Where the operands are expressions, so is the operation, and has a geometry. ``axis`` is where the tensors of a
    graph have their channels; a layer knows that by itself, and None says that it does not matter.
    """

    @cached_property
    def geometry(self) -> Geometry:
        """That of the one convolution. Raises NotAffine where it is none."""
        expression: Expression = self  # type: ignore[assignment]
        geometry = _geometry(expression)
        return replace(geometry, groups=_windows(expression).groups()) if _moves_channels(expression) else geometry

    @cached_property
    def tensor_names(self) -> tuple[str, ...]:
        """The name of every tensor that an expression reads, each time that it does."""
        expression: Expression = self  # type: ignore[assignment]
        return tuple(name for each in walk(expression) for name in _own_names(each) if isinstance(name, str))

    @cached_property
    def has_ones(self) -> bool:
        """Whether an expression reads its source with a channel of ones behind the others."""
        return any(operand.has_ones for operand in operands(self))

    @cached_property
    def convolves(self) -> bool:
        """Whether there is a convolution in an expression."""
        return any(operand.convolves for operand in operands(self))


@dataclass(frozen=True)
class Through(Operation[Operand]):
    """A layer after ``input``: a convolution, a linear layer, or another filter, such as a pool, a pad, a crop."""

    input: Operand
    layer: Layer

    @cached_property
    def convolves(self) -> bool:
        """Whether there is a convolution in it: this, or one before it."""
        return isinstance(self.layer, Convolution) or any(operand.convolves for operand in operands(self))


@dataclass(frozen=True)
class Scaled(Operation[Operand]):
    """Each channel of ``input`` times a number, plus a number: a normalisation, a layer scale.

    Where there are ``picks``, the number of channel c is the ``picks[c]``-th.
    """

    input: Operand
    by: Channelwise
    axis: int | None = None
    picks: Ints = ()


@dataclass(frozen=True)
class Selected(Operation[Operand]):
    """The channels ``indices`` of ``input``, in this order."""

    input: Operand
    indices: Ints
    axis: int | None = None


@dataclass(frozen=True)
class Joined(Operation[Operand]):
    """The channels of all ``inputs``, one after the other."""

    inputs: tuple[Operand, ...]
    axis: int | None = None


@dataclass(frozen=True)
class Sum(Operation[Operand]):
    """The sum of all ``inputs``."""

    inputs: tuple[Operand, ...]


@dataclass(frozen=True)
class Homogeneous(Operation[Operand]):
    """``input`` as a map of its source with a channel of ones behind the others, which adds no constant.

    ``W ⋆ x + b = [W, b] ⋆ [x, 1]``, b at one tap, which has to be inside the source always.
    """

    input: Operand
    has_ones = True


Expression: TypeAlias = (
    "Identity | Through[Expression] | Scaled[Expression] | Selected[Expression] | Joined[Expression] | Sum[Expression]"
    " | Homogeneous[Expression]"
)


def operands(operation: object) -> tuple[Any, ...]:
    """Return what an operation is done with; nothing for anything else."""
    kind = type(operation)
    if kind in _OF_ONE:
        return (operation.input,)  # type: ignore[attr-defined]
    return operation.inputs if kind in _OF_SEVERAL else ()  # type: ignore[attr-defined]


_OF_ONE = frozenset({Through, Scaled, Selected, Homogeneous})
_OF_SEVERAL = frozenset({Joined, Sum})


def walk(expression: Expression) -> Iterator[Expression]:
    """Yield all that an expression is made of, itself last."""
    for inner in operands(expression):
        yield from walk(inner)
    yield expression


def rebuilt(expression: Expression, change: Callable[[Expression], Expression]) -> Expression:
    """Return the operation with its operands changed. Raises NotAffine where it is no single convolution then."""
    changed: Any = tuple(map(change, operands(expression)))
    several = isinstance(expression, Joined | Sum)
    return _checked(replace(expression, **({"inputs": changed} if several else {"input": changed[0]})))


def through(inner: Expression, layer: Layer) -> Expression:
    """Return the layer after the expression. Raises NotAffine where they are no single convolution.

    Where ``inner.geometry.borders_show(layer.geometry)``, it is one only if the constant of ``inner`` is what the layer
    pads with; that takes the weights (``evaluation.constant``).
    """
    return _checked(Through(inner, layer))


def selected(inner: Expression, indices: Ints) -> Expression:
    """Return these channels of the expression."""
    return _checked(Selected(inner, indices))


def joined(parts: tuple[Expression, ...]) -> Expression:
    """Return the channels of all parts. Raises NotAffine where they are no single convolution."""
    return _checked(Joined(_of_ones_alike(parts)))


def sum_of(terms: tuple[Expression, ...]) -> Expression:
    """Return the sum. Raises NotAffine where the terms are no single convolution."""
    return terms[0] if len(terms) == 1 else _checked(Sum(_of_ones_alike(terms)))


def homogeneous(inner: Expression) -> Expression:
    """Return the expression as one that adds no constant. Raises NotAffine where that is not known to be possible."""
    geometry = inner.geometry
    if type(geometry) is not Geometry or not geometry.keeps_edges or inner.has_ones:
        raise NotAffine("shift-before-padding", f"{geometry.describe()} does not read a channel of ones at each pixel")
    return _checked(Homogeneous(inner))


def _of_ones_alike(parts: tuple[Expression, ...]) -> tuple[Expression, ...]:
    """Return parts of which one reads a channel of ones as maps of one source, which has it."""
    if not any(part.has_ones for part in parts):
        return parts
    source = max(part.geometry.in_channels for part in parts)
    return tuple(part if part.has_ones else of_whole(part, source, tuple(range(source - 1))) for part in parts)


def _checked(expression: Expression) -> Expression:
    """Return an expression that is one convolution: its geometry says so."""
    _ = expression.geometry
    return expression


def _geometry(expression: Expression) -> Geometry:  # noqa: PLR0911 - one for each kind
    """Return the geometry, with no more groups than those of its operands show."""
    match expression:
        case Identity():
            return expression.geometry
        case Through(Identity(), layer):
            return layer.geometry
        case Through(inner, layer):
            return inner.geometry.then(layer.geometry)
        case Scaled(inner):
            return inner.geometry
        case Homogeneous(inner):
            return replace(inner.geometry, in_channels=inner.geometry.in_channels + 1, groups=1)
        case Selected(inner, indices):
            return inner.geometry.select(indices)
        case Joined(parts):
            return Geometry.stacked([part.geometry for part in parts])
        case Sum(terms):
            return reduce(Geometry.add, (term.geometry for term in terms))


def _moves_channels(expression: Expression) -> bool:
    return any(isinstance(each, Selected | Joined) for each in walk(expression))


def _windows(expression: Expression) -> Windows:  # noqa: PLR0911 - one for each kind
    """Return which channels of the source each output channel reads."""
    match expression:
        case Identity():
            return Windows.of(expression.geometry)
        case Through(inner, layer):
            return _windows(inner).then(Windows.of(layer.geometry))
        case Scaled(inner):
            return _windows(inner)
        case Homogeneous():  # each reads the last channel
            return Windows.of(_geometry(expression))
        case Selected(inner, indices):
            return _windows(inner).select(indices)
        case Joined(parts):
            return Windows.concat([_windows(part) for part in parts])
        case Sum(terms):
            return reduce(Windows.union, map(_windows, terms))


def laid_anyhow(expression: Expression) -> bool:
    """Whether an expression is the source times or plus numbers: then nothing says where that has its channels."""
    match expression:
        case Identity():
            return True
        case Scaled(inner, Factor(float()) | Offset(by=float(), scale=float())):
            return laid_anyhow(inner)
        case _:
            return False


def relaid(expression: Expression, channels: int, ndim: int) -> Expression:
    """Return what is ``laid_anyhow`` as an expression of so many channels and ``ndim`` axes; any other as it is."""
    if not laid_anyhow(expression):
        return expression
    if isinstance(expression, Scaled):
        return replace(expression, input=relaid(expression.input, channels, ndim))
    return Identity(channels, ndim)


def of_channels_alone(expression: Expression, ndim: int) -> Expression | None:
    """Return an expression that acts on the channels of each pixel alone as one of ``ndim`` spatial axes; else None.

    Linear layers and 1x1 are such, and what scales and shifts channels.
    """
    match expression:
        case Identity(channels):
            return Identity(channels, ndim)
        case Scaled(inner):
            plain = of_channels_alone(inner, ndim)
            return None if plain is None else replace(expression, input=plain)
        case Through(inner, Convolution(geometry) as layer) if geometry.is_pointwise:
            plain = of_channels_alone(inner, ndim)
            return None if plain is None else through(plain, on_axes(layer, ndim))
        case Sum(terms):
            found = [of_channels_alone(term, ndim) for term in terms]
            whole = tuple(term for term in found if term is not None)
            return sum_of(whole) if len(whole) == len(terms) else None
        case _:
            return None if ndim or expression.geometry.ndim else expression


def on_axes(layer: Convolution, ndim: int) -> Convolution:
    """Return a layer of single pixels as one of ``ndim`` spatial axes."""
    geometry = layer.geometry
    if geometry.ndim == ndim:
        return layer
    ones = (1,) * ndim
    point = Geometry(geometry.in_channels, geometry.out_channels, ones, ones, ((0, 0),) * ndim, ones)
    return replace(layer, geometry=point, order=layer.order or tuple(range(2 + geometry.ndim)))


def multiple_of_source(expression: Expression) -> float | None:
    """Return the number that an expression multiplies its source by, if it does nothing else."""
    match expression:
        case Identity():
            return 1.0
        case Scaled(inner, Factor(float() as by, False, 1.0)):
            inside = multiple_of_source(inner)
            return None if inside is None else by * inside
        case _:
            return None


def channels_read(expression: Expression) -> Ints | None:
    """Return the channels of the source that the expression chooses before all else, where all of it chooses these.

    None as well where it chooses one of them twice, which then reads the sum of two columns of the weight.
    """
    match expression:
        case Selected(Identity(), indices):
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
        case Selected(Identity(_, ndim), indices):
            return Identity(len(indices), ndim)
        case _:
            return rebuilt(expression, of_channels_read)


def of_whole(expression: Expression, channels: int, indices: Ints) -> Expression:
    """Return the expression of a part of a tensor of ``channels``, its channels ``indices``, as one of that tensor.

    Raises NotAffine where that is no single convolution.
    """
    match expression:
        case Identity(_, ndim):
            return Selected(Identity(channels, ndim), indices)
        case _:
            return rebuilt(expression, lambda inner: of_whole(inner, channels, indices))


def layers(expression: Expression) -> Iterator[Layer]:
    """Yield the layers in the expression."""
    return (each.layer for each in walk(expression) if isinstance(each, Through))


def convolutions(expression: Expression) -> Iterator[Convolution]:
    """Yield the convolutions in the expression."""
    return (layer for layer in layers(expression) if isinstance(layer, Convolution))


def is_unshifted(expression: Expression) -> bool:
    """Whether the expression adds nothing to what it computes from its source, whatever the weights."""
    match expression:
        case Homogeneous():
            return True
        case Scaled(_, Normalisation(str()) | Normalisation(bias=str()) | Offset()):
            return False
        case Through(_, Convolution(_, _, str())):
            return False
    return all(map(is_unshifted, operands(expression)))


def _own_names(expression: Expression) -> tuple[object, ...]:
    """Return what the last operation of an expression has in the place of tensors: their names, numbers, nothing."""
    match expression:
        case Through(_, Convolution(_, weight, bias)):
            return weight, bias
        case Through(_, Filter(_, _, fill)):
            return (fill,)
        case Scaled(_, Normalisation(mean, var, weight, bias)):
            return mean, var, weight, bias
        case Scaled(_, Factor(by)):
            return (by,)
        case Scaled(_, Offset(by, _, scale)):
            return by, scale
        case _:
            return ()


# An expression for people: each branch of the sum in a few words.


def branches(expression: Expression) -> tuple[str, ...]:
    """Describe each branch of the sum, such as ``conv 3x3 + norm``; layers in a row read from first to last."""
    match expression:
        case Sum(terms):
            return tuple(name for term in terms for name in branches(term))
        case Scaled(inner, by):
            return tuple(_scaled(name, by, isinstance(inner, Sum)) for name in branches(inner))
        case Identity():
            return ("skip",)
        case _:
            return (_row(expression),)


def _scaled(name: str, by: Channelwise, after_sum: bool) -> str:
    match by:
        case Normalisation():
            return f"{name} (norm after the sum)" if after_sum else f"{name} + norm"
        case Factor(float() as number, False, 1.0):
            return f"{number:g} * {name}"
        case Factor():
            return f"{name} + scale"
        case Offset():
            return f"{name} + shift"


def _row(expression: Expression) -> str:  # noqa: PLR0911 - one for each kind
    """Describe a branch from its first layer to its last, ``conv 1x1 + norm → conv 3x3``."""
    match expression:
        case Through(Identity(), layer):
            return _layer(layer)
        case Through(inner, layer):
            return f"{_inside(inner)} → {_layer(layer)}"
        case Selected(Joined(parts)) if len(set(names := [*map(_inside, parts)])) == 1 and len(parts) > 1:
            return f"{names[0]}, of {len(parts)} phases"
        case Selected(inner, indices):
            some = f"{len(indices)} of {inner.geometry.out_channels} channels"
            return some if isinstance(inner, Identity) else f"{_inside(inner)} → {some}"
        case Joined(parts):
            return f"cat({', '.join(map(_inside, parts))})"
        case Homogeneous(inner):
            return f"{_inside(inner)} + ones"
        case _:
            return _inside(expression)


def _inside(expression: Expression) -> str:
    names = branches(expression)
    return names[0] if len(names) == 1 else f"({' and '.join(names)})"


def _layer(layer: Layer) -> str:
    geometry = layer.geometry
    if isinstance(layer, Convolution):
        return f"conv {geometry.describe()}" if geometry.ndim else "linear"
    if isinstance(layer, Phases):
        return f"unshuffle {_size(geometry)}"
    if any(kernel > 1 for kernel in geometry.kernel):
        return f"avg {_size(geometry)}"
    if any(amount > 0 for pair in geometry.padding for amount in pair):
        return "pad"
    return "crop"


def _size(geometry: Geometry) -> str:
    return "x".join(map(str, geometry.kernel))
