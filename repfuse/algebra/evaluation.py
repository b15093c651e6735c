"""expression + tensors -> weight and bias: computed in float64, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from math import prod

import torch
from torch import Tensor

from repfuse.algebra.affine import Addend, AffineConv, check_beyond, response, sum_weights, swap_layout
from repfuse.algebra.expression import (
    Expression,
    Homogeneous,
    Identity,
    Joined,
    Scaled,
    Selected,
    Sum,
    Through,
    channels_read,
    is_unshifted,
    of_channels_read,
)
from repfuse.algebra.layers import Channelwise, Convolution, Factor, Filter, Layer, Normalisation, Offset, Phases

Tensors = Callable[[str], Tensor]


def evaluate(
    expression: Expression, tensors: Tensors, like: Tensor, empty: Callable[..., Tensor] = torch.empty
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the fused map, with the dtype and device of ``like``; ``empty`` makes the weight.

    Raises NotAffine where a layer pads with another number than the constant of what is before it.
    """
    addends, geometry = list(_addends(expression, tensors, None, like.device)), expression.geometry
    laid = empty(geometry.weight_shape, dtype=like.dtype, device=like.device)
    sum_weights(geometry, addends, laid)
    weight = swap_layout(geometry, laid).contiguous()
    return weight, constant(expression, tensors, like.device).to(like.dtype, copy=True)


def behind_norm(
    expression: Expression, tensors: Tensors, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the map as a convolution without bias and a normalisation with these statistics: the weight of the one,
    with a range of 1 in each output channel, and weight and bias of the other, in float64.

    ``W x + b = s (W / s x - mean) + (b + s mean)``, and a normalisation multiplies by ``weight / sqrt(var + eps)``.
    """
    wide = torch.empty(0, dtype=torch.float64, device=mean.device)
    weight, bias = evaluate(expression, tensors, wide)
    laid = swap_layout(expression.geometry, weight)
    size = laid.abs().flatten(1).amax(1)
    size += size == 0
    weight = swap_layout(expression.geometry, laid / size.reshape(-1, *(1 for _ in laid.shape[1:])))
    return weight.contiguous(), size * (var.double() + eps).sqrt(), bias + size * mean.double()


def constant(expression: Expression, tensors: Tensors, device: torch.device) -> Tensor:
    """Return what the expression is where its source is zero: float64 ``[C_out]``, the bias of the map."""
    if is_unshifted(expression):
        return torch.zeros(expression.geometry.out_channels, dtype=torch.float64, device=device)
    match expression:
        case Through(inner, layer):
            return _layer_constant(layer, None if is_unshifted(inner) else constant(inner, tensors, device), tensors)
        case Scaled(inner):
            scale, shift = scale_and_shift(expression, tensors)
            value = constant(inner, tensors, device)
            value = value if scale is None else value * scale
            return value if shift is None else value + shift
        case Selected(inner, indices):
            return constant(inner, tensors, device)[list(indices)]
        case Joined(parts):
            return torch.cat([constant(part, tensors, device) for part in parts])
        case Sum(terms):
            return torch.stack([constant(term, tensors, device) for term in terms]).sum(0)
        case Identity() | Homogeneous():
            raise AssertionError("it adds nothing to its source")


def border_takes_weights(inner: Expression, layer: Layer) -> bool:
    """Whether it depends on the weights that ``layer`` pads ``inner`` with what that is beyond its border."""
    shows = inner.geometry.borders_show(layer.geometry)
    return shows and not (_fill(layer) == 0 and is_unshifted(inner))


def check_borders(inner: Expression, layer: Layer, tensors: Tensors, device: torch.device) -> None:
    """Raise NotAffine where ``layer`` pads ``inner`` with something else than what that is beyond its border.

    The law of borders: padding an intermediate value is exact only where that value is the same outside too.
    """
    if border_takes_weights(inner, layer):
        check_beyond(constant(inner, tensors, device), _number(_fill(layer), tensors))


def _fill(layer: Layer) -> float | str:
    """Return what a layer pads with: a number, or the name of one number per channel."""
    return layer.fill if isinstance(layer, Filter) else 0.0


def _layer_constant(layer: Layer, inside: Tensor | None, tensors: Tensors) -> Tensor:
    """Return the layer's answer to the constant ``inside`` (None: zero), away from all borders."""
    own = tensors(layer.bias).double() if isinstance(layer, Convolution) and layer.bias is not None else None
    if inside is None:
        assert own is not None
        return own
    if isinstance(layer, Filter):
        return inside * (layer.value * prod(layer.geometry.kernel))
    if isinstance(layer, Phases):
        taps = inside.repeat_interleave(prod(layer.geometry.kernel))
        return taps[list(layer.order)] if layer.order else taps
    answer = response(layer.geometry, stored_weight(layer, tensors).double(), inside)
    return answer if own is None else answer + own


def scale_and_shift(scaled: Scaled[Expression], tensors: Tensors) -> tuple[Tensor | None, Tensor | None]:
    """Return ``s`` and ``t`` of ``y = s x + t``, float64 of C numbers or of one; None for 1 and for 0."""
    scale = _scale(scaled.by, tensors)
    return _picked(scale, scaled), _picked(_shift(scaled.by, scale, tensors), scaled)


def _picked(numbers: Tensor | None, scaled: Scaled[Expression]) -> Tensor | None:
    """Return the numbers that the channels of ``scaled`` have, of those that its ``by`` has numbers for."""
    return numbers if numbers is None or not scaled.picks or numbers.numel() == 1 else numbers[list(scaled.picks)]


def _scale(by: Channelwise, tensors: Tensors) -> Tensor | None:
    """Return what ``by`` multiplies by; a normalisation by ``s = weight / sqrt(var + eps)``."""
    match by:
        case Normalisation(_, var, weight, _, eps):
            scale = (_number(var, tensors) + eps).rsqrt()
            return scale if weight is None else scale * _number(weight, tensors)
        case Factor(value, inverse, times):
            factor = _number(value, tensors)
            return (factor.reciprocal() if inverse else factor) * times
        case Offset(_, _, scale):
            return None if scale == 1 else _number(scale, tensors)


def _shift(by: Channelwise, scale: Tensor | None, tensors: Tensors) -> Tensor | None:
    """Return what ``by`` adds; a normalisation ``t = bias - mean * s``, with its scale s."""
    match by:
        case Normalisation(mean, _, _, bias, _):
            inside = None if mean is None or scale is None else _number(mean, tensors) * scale
            if bias is None:
                return None if inside is None else -inside
            return _number(bias, tensors) if inside is None else _number(bias, tensors) - inside
        case Factor():
            return None
        case Offset(value, factor, _):
            return _number(value, tensors) * factor


def _number(value: float | str, tensors: Tensors) -> Tensor:
    """Return one number per channel, or one for all."""
    if not isinstance(value, str):
        return torch.tensor(value, dtype=torch.float64)
    return tensors(value).double().flatten()


def _addends(expression: Expression, tensors: Tensors, scale: Tensor | None, device: torch.device) -> Iterator[Addend]:
    """Yield the weights of ``scale * expression``: scales go down the tree, so every weight is touched once."""
    match expression:
        case Identity():
            ones = torch.ones(expression.geometry.weight_shape, dtype=torch.float64, device=device)
            yield Addend(expression.geometry, ones, scale)
        case Through(Identity(), Convolution() as layer):
            yield Addend(layer.geometry, stored_weight(layer, tensors), scale)
        case Scaled(inner):
            own = _picked(_scale(expression.by, tensors), expression)
            if own is not None:
                own = own.to(device).expand(expression.geometry.out_channels)
            yield from _addends(inner, tensors, _times(scale, own), device)
        case Sum(terms):
            for term in terms:
                yield from _addends(term, tensors, scale, device)
        case _:
            made = exact(expression, tensors, device)
            yield Addend(made.geometry, made.weight, scale)


def _times(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one * other


def exact(  # noqa: PLR0911 - one for each kind
    expression: Expression, tensors: Tensors, device: torch.device
) -> AffineConv:
    """Return the whole map in float64. Raises NotAffine where a padding does not hold what is beyond the border."""
    match expression:
        case Identity(channels, ndim):
            return AffineConv.identity(channels, ndim, device)
        case Through(Identity(), layer):
            return _layer_map(layer, tensors, device)
        case Homogeneous(inner):
            return exact(inner, tensors, device).homogeneous()
        case Scaled(inner):
            return _scaled_map(exact(inner, tensors, device), *scale_and_shift(expression, tensors))
        case Joined(parts):
            return AffineConv.stack_on(expression.geometry, [_of_channels(part, tensors, device) for part in parts])
        case Through() | Sum() | Selected() if channels_read(expression) is not None:
            return AffineConv.stack_on(expression.geometry, [_of_channels(expression, tensors, device)])
        case Through(inner, layer):
            check_borders(inner, layer, tensors, device)  # as the plan asks, to the last digit
            before = exact(inner, tensors, device)
            made = before.then(_layer_map(layer, tensors, device), before.bias)
        case Selected(inner, indices):
            made = exact(inner, tensors, device).select(indices)
        case Sum(terms):
            made = reduce(AffineConv.add, (exact(term, tensors, device) for term in terms))
    return made.regroup(expression.geometry.groups)


def _of_channels(expression: Expression, tensors: Tensors, device: torch.device) -> tuple[AffineConv, Sequence[int]]:
    """Return the map of the channels that the expression reads, and these."""
    channels = channels_read(expression)
    if channels is None:
        return exact(expression, tensors, device), range(expression.geometry.in_channels)
    return exact(of_channels_read(expression), tensors, device), channels


def _scaled_map(made: AffineConv, scale: Tensor | None, shift: Tensor | None) -> AffineConv:
    ones = torch.ones_like(made.bias)
    return made.scale(ones if scale is None else ones * scale, 0 * ones if shift is None else ones * shift)


def _layer_map(layer: Layer, tensors: Tensors, device: torch.device) -> AffineConv:
    if isinstance(layer, Filter):
        return AffineConv.filter(layer.geometry, layer.value, device)
    if isinstance(layer, Phases):
        return AffineConv.phases(layer, device)
    bias = None if layer.bias is None else tensors(layer.bias)
    return AffineConv.convolution(layer.geometry, stored_weight(layer, tensors), bias)


def stored_weight(layer: Convolution, tensors: Tensors) -> Tensor:
    """Return the weight of the layer, ``geometry.weight_shape``, in its own dtype."""
    weight = tensors(layer.weight)
    if layer.order:
        return weight.permute(layer.order).reshape(layer.geometry.weight_shape)
    return swap_layout(layer.geometry, weight)
