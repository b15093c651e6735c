"""Random expressions over a source, and what they mean: plain torch, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from repfuse.algebra.expression import (
    Expression,
    Identity,
    Joined,
    Scaled,
    Selected,
    Sum,
    Through,
    joined,
    selected,
    sum_of,
    through,
)
from repfuse.algebra.geometry import Geometry, NotAffine
from repfuse.algebra.layers import Convolution, Factor, Filter, Normalisation, Offset
from repfuse.algebra.transposed import TransposedGeometry

CHANNELS = 4


class Tensors(dict[str, Tensor]):
    """Tensors by name, made as they are asked for; looks them up by being called."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.read: set[str] = set()

    def put(self, name: str, *shape: int) -> None:
        self[name] = torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def new(self, *shape: int, positive: bool = False) -> str:
        name = f"t{len(self)}"
        self.put(name, *shape)
        if positive:
            self[name] = self[name].abs() + 0.5
        return name

    def __call__(self, name: str) -> Tensor:
        self.read.add(name)
        return self[name]


def run(expression: Expression, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Compute the expression from ``x`` of shape ``[N, C, *axes]``, one layer after the other."""
    match expression:
        case Identity():
            return x
        case Through(inner, layer):
            return _through(run(inner, x, tensors), layer, tensors)
        case Scaled(inner, by, _, picks):
            y = run(inner, x, tensors)
            if not picks:
                return _scaled(y, by, tensors)
            every = (y[:, [channel]].expand(-1, 1 + max(picks), *y.shape[2:]) for channel in range(y.shape[1]))
            return torch.cat([_scaled(z, by, tensors)[:, [pick]] for z, pick in zip(every, picks, strict=True)], 1)
        case Selected(inner, indices):
            return run(inner, x, tensors)[:, list(indices)]
        case Joined(parts):
            return torch.cat([run(part, x, tensors) for part in parts], 1)
        case Sum(terms):
            return sum(run(term, x, tensors) for term in terms)


def _through(x: Tensor, layer: Convolution | Filter, tensors: Mapping[str, Tensor]) -> Tensor:
    shape = layer.geometry
    if isinstance(layer, Filter):
        fill = _along(layer.fill, x, tensors)
        weight, bias = torch.full(shape.weight_shape, layer.value, dtype=x.dtype), None
        return _convolved(F.pad(x - fill, _amounts(shape)) + fill, shape, weight, bias)
    weight, bias = tensors[layer.weight].double(), None if layer.bias is None else tensors[layer.bias].double()
    weight = weight.permute(layer.order).reshape(shape.weight_shape) if layer.order else weight
    if isinstance(shape, TransposedGeometry):
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[shape.ndim - 1]
        padding = [before for before, _ in shape.padding]
        return convolve(x, weight, bias, shape.stride, padding, shape.output_padding, shape.groups, shape.dilation)
    return _convolved(F.pad(x, _amounts(shape)), shape, weight, bias)


def _amounts(shape: Geometry) -> list[int]:
    return [amount for pair in reversed(shape.padding) for amount in pair]


def _convolved(x: Tensor, shape: Geometry, weight: Tensor, bias: Tensor | None) -> Tensor:
    convolve = (F.conv1d, F.conv2d, F.conv3d)[shape.ndim - 1]
    return convolve(x, weight, bias, shape.stride, 0, shape.dilation, shape.groups)


def _along(value: float | str, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | float:
    return tensors[value].double().view(-1, *[1] * (x.dim() - 2)) if isinstance(value, str) else value


def _scaled(x: Tensor, by: Normalisation | Factor | Offset, tensors: Mapping[str, Tensor]) -> Tensor:
    match by:
        case Normalisation(mean, var, weight, bias, eps):
            x = x if mean is None else x - _along(mean, x, tensors)
            x = x / (_along(var, x, tensors) + eps).sqrt()
            x = x if weight is None else x * _along(weight, x, tensors)
            return x if bias is None else x + _along(bias, x, tensors)
        case Factor(value, inverse, times):
            return times * (x / _along(value, x, tensors) if inverse else x * _along(value, x, tensors))
        case Offset(value, factor, scale):
            return _along(scale, x, tensors) * x + factor * _along(value, x, tensors)


def square(inputs: int, outputs: int, kernel: int, groups: int = 1, dilation: int = 1) -> Geometry:
    """A convolution of two axes that keeps the size."""
    reach = dilation * (kernel - 1) // 2
    return Geometry(inputs, outputs, (kernel,) * 2, (1, 1), ((reach, reach),) * 2, (dilation,) * 2, groups)


@st.composite
def expressions(draw, tensors: Tensors, depth: int | None = None) -> Expression:
    """An expression of a source of ``CHANNELS`` channels, each of whose parts keeps the size of the image."""
    depth = draw(st.integers(0, 4)) if depth is None else depth
    if depth == 0:
        return Identity(CHANNELS, 2)
    inner = draw(expressions(tensors, depth - 1))
    kind = draw(st.sampled_from(["convolution", "filter", "scaled", "scaled", "selected", "joined", "sum"]))
    try:
        if kind == "convolution":
            return through(inner, draw(_convolution(inner.geometry.out_channels, tensors)))
        if kind == "filter":
            return through(inner, draw(_filter(inner.geometry.out_channels, tensors)))
        if kind == "selected":
            last = inner.geometry.out_channels - 1
            return selected(inner, tuple(draw(st.lists(st.integers(0, last), min_size=1, max_size=6))))
        if kind == "joined":
            return joined((inner, draw(expressions(tensors, depth - 1))))
        if kind == "sum":
            layer = draw(_convolution(CHANNELS, tensors, inner.geometry.out_channels))
            return sum_of((inner, through(Identity(CHANNELS, 2), layer)))
    except NotAffine:
        return inner
    return Scaled(inner, draw(channelwise(inner.geometry.out_channels, tensors)))


@st.composite
def _convolution(draw, inputs: int, tensors: Tensors, outputs: int | None = None) -> Convolution:
    outputs = outputs or draw(st.sampled_from([2, 4, 6]))
    groups = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6) if inputs % n == outputs % n == 0]))
    shape = square(inputs, outputs, draw(st.sampled_from([1, 1, 3])), groups, draw(st.integers(1, 2)))
    bias = tensors.new(outputs) if draw(st.booleans()) else None
    if shape.kernel == (1, 1) and draw(st.booleans()):  # a matrix, as products have it
        return Convolution(shape, tensors.new(1, inputs // groups, outputs), bias, (0, 2, 1))
    return Convolution(shape, tensors.new(*shape.weight_shape), bias)


@st.composite
def _filter(draw, channels: int, tensors: Tensors) -> Filter:
    kernel = draw(st.sampled_from([1, 3]))
    return Filter(square(channels, channels, kernel, channels), draw(st.sampled_from([1 / kernel**2, 0.5])))


@st.composite
def channelwise(draw, channels: int, tensors: Tensors) -> Normalisation | Factor | Offset:
    """One number per channel to multiply with, and one to add, in all the ways there are."""

    def some(*, positive: bool = False) -> str:
        return tensors.new(draw(st.sampled_from([1, channels])), positive=positive)

    def maybe() -> str | None:
        return tensors.new(channels) if draw(st.booleans()) else None

    return draw(
        st.one_of(
            st.builds(lambda: Normalisation(maybe(), tensors.new(channels, positive=True), maybe(), maybe(), 0.25)),
            st.builds(
                lambda inverse, times: Factor(some(positive=True), inverse, times),
                *(st.booleans(), st.sampled_from([1.0, -1.0, 2.5])),
            ),
            st.builds(Factor, st.sampled_from([0.5, -2.0]), st.booleans()),
            st.builds(lambda factor, scale: Offset(some(), factor, scale), *[st.sampled_from([1.0, 2.0])] * 2),
            st.builds(lambda scale: Offset(3.0, -1.0, scale), st.sampled_from([1.0, 0.5])),
            st.builds(lambda factor: Offset(some(), factor, some()), st.sampled_from([1.0, 2.0])),
        )
    )
