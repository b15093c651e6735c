"""An expression for people: each branch of the sum in a few words."""

from __future__ import annotations

from repfuse.algebra.expression import Expression, Identity, Joined, Scaled, Selected, Sum, Through
from repfuse.algebra.geometry import Geometry
from repfuse.algebra.layers import Channelwise, Convolution, Factor, Layer, Normalisation, Offset, Phases


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
        case Factor(float() as number, inverse):
            return f"{1 / number if inverse else number:g} * {name}"
        case Factor():
            return f"{name} + scale"
        case Offset():
            return f"{name} + shift"


def _row(expression: Expression) -> str:
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
