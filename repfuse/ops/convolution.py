"""Convolutions: how their arguments, in any spelling, become a geometry and two names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import fx

from repfuse.algebra.expression import Through
from repfuse.algebra.geometry import Geometry, Ints, Padding
from repfuse.algebra.layers import Convolution
from repfuse.algebra.transposed import TransposedGeometry
from repfuse.ops.meaning import Meaning, Unfusible
from repfuse.ops.spelling import Call, Constant, constant, contains_node, spelled
from repfuse.recording.recording import Recording

# Fake quantisation: rounding that training puts beside layers, so that a later quantised model behaves alike.
#
# A value rounded that way is no affine map of its input, and a weight rounded that way is chosen for its own layer: in
# a merged kernel the rounding would have to be found again.


_FAKE_QUANTISED_WEIGHT = Unfusible("fake-quantised", "the weight is rounded as a quantised one would be")


def refused_as_fake(weight: Any) -> Unfusible | None:
    """Refuse a weight that went through fake quantisation on its way from the parameters."""
    pending: list[Any] = [weight]
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        call = spelled(node)
        if call is not None and call.operator.startswith("fake_quantize"):
            return _FAKE_QUANTISED_WEIGHT
        pending += node.all_input_nodes
    return None


def convolution(call: Call, recording: Recording) -> Meaning | None:
    """``y = W ⋆ x + b`` with W of shape ``[C_out, C_in / groups, *kernel]``, a constant."""
    if call.get("transposed", False) is not False:
        return transposed(call, recording)
    return _convolved(call, recording, geometry)


def transposed(call: Call, recording: Recording) -> Meaning | None:
    """A transposed convolution with W of shape ``[C_in, C_out / groups, *kernel]``, a constant."""
    extra = call.get("output_padding", 0)
    if contains_node(extra):
        return None
    return _convolved(call, recording, partial(transposed_geometry, output_padding=extra))


def _convolved(call: Call, recording: Recording, shape: Callable[..., Geometry]) -> Meaning | None:
    """Read what both kinds of convolution are given; ``shape`` makes a geometry of the weight's shape and the rest."""
    x = call.input
    tensors = layer_tensors(call, recording)
    if isinstance(tensors, Unfusible):
        return tensors
    usual = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    arguments = [call.get(name, value) for name, value in usual.items()]
    if contains_node(arguments):
        return Unfusible("computed-weight", "the stride, padding, dilation or groups are computed in forward")
    weight, bias = tensors
    if len(recording.shape_of[x]) != len(weight.shape):
        return Unfusible("channel-mismatch", "a convolution of an input without a batch axis")
    bent = shape(weight.shape, *arguments)
    return Through(x, Convolution(bent, weight.name, None if bias is None else bias.name))


def layer_tensors(call: Call, recording: Recording) -> tuple[Constant, Constant | None] | Unfusible:
    """Return the weight and the bias of a layer; why they are no constants, if so."""
    if (refusal := refused_as_fake(call.get("weight"))) is not None:
        return refusal
    weight, bias = (constant(call.get(name), recording) for name in ("weight", "bias"))
    if weight is None or (bias is None and call.get("bias") is not None):
        return Unfusible("computed-weight", "the weight or bias depends on the input of the model")
    return weight, bias


def geometry(
    weight_shape: Sequence[int],
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> Geometry:
    """Return the geometry of ``torch.nn.functional.conv*d`` with a weight of this shape and these arguments."""
    kernel = tuple(weight_shape[2:])
    ndim = len(kernel)
    dilations = per_axis(dilation, ndim)
    pads = _padding(padding, kernel, dilations)
    return Geometry(
        in_channels=weight_shape[1] * groups,
        out_channels=weight_shape[0],
        kernel=kernel,
        stride=per_axis(stride, ndim),
        padding=pads,
        # A single tap has no spacing: one canonical value makes equal geometries compare equal.
        dilation=tuple(1 if k == 1 else d for k, d in zip(kernel, dilations, strict=True)),
        groups=groups,
    )


def transposed_geometry(
    weight_shape: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    *,
    output_padding: int | Sequence[int],
) -> TransposedGeometry:
    """Return the geometry of ``torch.nn.functional.conv_transpose*d`` with a weight of this shape."""
    plain = geometry((weight_shape[1] * groups, weight_shape[0] // groups, *weight_shape[2:]), stride, 0, 1, groups)
    return TransposedGeometry(
        in_channels=plain.in_channels,
        out_channels=plain.out_channels,
        kernel=plain.kernel,
        stride=plain.stride,
        padding=_padding(padding, plain.kernel, plain.dilation),
        dilation=per_axis(dilation, plain.ndim),
        groups=groups,
        output_padding=per_axis(output_padding, plain.ndim),
    )


def per_axis(value: int | Sequence[int], ndim: int) -> Ints:
    """Return one number per spatial axis from PyTorch's int or sequence (a sequence of one stands for all)."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * ndim if len(values) == 1 else values


def _padding(padding: int | str | Sequence[int], kernel: Ints, dilation: Ints) -> Padding:
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        # PyTorch puts the odd one after the input.
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    assert not isinstance(padding, str)
    return tuple((amount, amount) for amount in per_axis(padding, len(kernel)))
