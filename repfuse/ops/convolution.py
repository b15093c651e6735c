"""Layers with a kernel: what a convolution is given, in any spelling, as a geometry and two names; pads, crops, average
pools and nearest upsampling, each of them one fixed depthwise kernel, equal for all channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import fx

from repfuse.algebra.expression import Through
from repfuse.algebra.geometry import Geometry, Ints, Padding
from repfuse.algebra.layers import Convolution, Filter
from repfuse.algebra.transposed import TransposedGeometry
from repfuse.ops.meaning import Meaning, Rearranged, Same, Unfusible
from repfuse.ops.spelling import Call, Constant, constant, contains_node, number, spelled
from repfuse.recording.recording import Recording
from repfuse.recording.shortcuts import per_axis

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


def _padding(padding: int | str | Sequence[int], kernel: Ints, dilation: Ints) -> Padding:
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        # PyTorch puts the odd one after the input.
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    assert not isinstance(padding, str)
    return tuple((amount, amount) for amount in per_axis(padding, len(kernel)))


# Fixed kernels.


def pad(call: Call, recording: Recording, *, mode: str | None = None) -> Meaning | None:
    """``F.pad`` over spatial axes: one tap of value 1; a negative amount crops."""
    x, mode, value = call.input, mode or call.get("mode", "constant"), call.get("value")
    fill = 0.0 if value is None else number(value)
    padding = _spatial_padding(call, mode, recording)
    if padding is None or fill is None:
        return None
    if mode == "constant":
        return filtered(x, padding, recording, fill=fill)
    # Nothing in a convolution's padding mode stands for a crop.
    usable = mode in ("reflect", "replicate", "circular") and all(amount >= 0 for pair in padding for amount in pair)
    return filtered(x, padding, recording, padding_mode=mode) if usable else None


def _spatial_padding(call: Call, mode: object, recording: Recording) -> Padding | None:
    """Return (before, after) per spatial axis; None where other axes are padded, or amounts are computed."""
    x, amounts = call.input, call.get("pad")
    if not isinstance(amounts, list | tuple) or contains_node(amounts):
        return None
    ndim = len(recording.shape_of[x]) - 2
    # The amounts begin with the last axis.
    pairs = [(int(before), int(after)) for before, after in zip(amounts[::2], amounts[1::2], strict=True)]
    if not 1 <= ndim <= 3 or any(any(pair) for pair in pairs[ndim:]):
        return None
    if mode != "constant" and len(pairs) != ndim:
        return None
    spatial = pairs[:ndim] + [(0, 0)] * (ndim - len(pairs))
    return tuple(reversed(spatial))


def average_pool(call: Call, recording: Recording, *, ndim: int) -> Meaning | None:
    """The mean of each window: as many equal taps, where every window has the same divisor.

    Source: torch.nn.AvgPool2d. A window that lies partly in the padding is divided by less with
    ``count_include_pad=False``, one that leaves the padded input (``ceil_mode``) by less too.
    """
    x = call.input
    numbers = [value for name, value in call.given.items() if name != "input"]
    if len(recording.shape_of[x]) != ndim + 2:
        return None
    amounts, divisor = call.get("padding", 0), call.get("divisor_override")
    if contains_node(numbers):  # windows that are as large as the image, say: means of pixels, whichever they are
        padded = contains_node(amounts) or any(per_axis(amounts, ndim))
        return None if padded or divisor is not None else Rearranged(x, ((1, 1),))
    kernel, padding = per_axis(call.get("kernel_size"), ndim), per_axis(amounts, ndim)
    stride = per_axis(call.get("stride") or kernel, ndim)
    if call.get("ceil_mode", False) and not _same_rounded_up(kernel, stride, padding):
        return Unfusible("pool-ceil", "with ceil_mode the last window of some input sizes is cut off")
    if divisor is None and any(padding) and not call.get("count_include_pad", True):
        return Unfusible("pool-padding", "windows at the border have a smaller divisor")
    pads = tuple((amount, amount) for amount in padding)
    return filtered(x, pads, recording, kernel=kernel, stride=stride, value=1 / (divisor or math.prod(kernel)))


def _same_rounded_up(kernel: Ints, stride: Ints, padding: Ints) -> bool:
    """Whether ``ceil_mode`` makes no difference, for any input size n.

    It admits each window that begins within the input or the padding before it: of the starts 0, s, 2s, ... those
    below both n + p and n + 2p - k + s; without it those below n + 2p - k + 1. The two agree for every n if s = 1 or
    n + p <= n + 2p - k + 1. (PyTorch keeps p <= k / 2.)
    """
    return all(s == 1 or k <= p + 1 for k, s, p in zip(kernel, stride, padding, strict=True))


def enlarged(call: Call, recording: Recording) -> Meaning | None:
    """Nearest upsampling by whole numbers r: ``y[o] = x[floor(o / r)]``, a transposed kernel of r ones and stride r.

    It is read as that before a convolution of several taps, which of each r pixels in a row meets the same one; what
    acts on channels alone goes across it instead (``ops.channels.resized``). Source: torch.nn.Upsample.
    """
    x, given = call.input, call.get("scale_factor") or call.get("scale_factors")
    kind = call.get("mode", "nearest") if call.operator in ("interpolate", "upsample") else call.operator
    ndim = len(recording.shape_of[x]) - 2
    factors = given if isinstance(given, list | tuple) else [given] * ndim
    whole = "nearest" in kind and all(factor in _FACTORS for factor in factors)
    if not whole or not recording.is_fixed(x, 1) or not _is_convolved(call.node, recording):
        return None
    steps, channels, none = tuple(map(int, factors)), recording.shape_of[x][1], (0,) * ndim
    pads, ones = ((0, 0),) * ndim, (1,) * ndim
    geometry = TransposedGeometry(channels, channels, steps, steps, pads, ones, channels, output_padding=none)
    return Through(x, Filter(geometry, 1.0))


_FACTORS = range(1, 41)
"""Factors of which PyTorch's ``floor(o * (1 / r))``, in float32, is right: from 41 on it is one less at some pixels."""


def _is_convolved(node: fx.Node, recording: Recording) -> bool:
    """Whether a convolution of several taps, not a depthwise one, reads the value, as it is or padded.

    Runtimes are slow at depthwise transposed ones: at a third of the speed, measured in ONNX Runtime.
    """
    calls = [call for user in node.users if (call := spelled(user)) is not None and call.input is node]
    shapes = (recording.shape_of[call.get("weight")] for call in calls if "conv" in call.operator)
    wide = (channels > 1 and math.prod(kernel) > 1 for _, channels, *kernel in shapes)
    padded = (call.node for call in calls if call.operator in _PADS)
    return any(wide) or any(_is_convolved(each, recording) for each in padded)


_PADS = {"pad", "constant_pad_nd"}


def filtered(
    x: fx.Node,
    padding: Padding,
    recording: Recording,
    *,
    kernel: Ints | None = None,
    stride: Ints | None = None,
    value: float = 1.0,
    fill: float | str = 0.0,
    padding_mode: str = "zeros",
) -> Through[fx.Node] | Same | None:
    """Return the meaning of a filter of ``x``, an image; one tap of value 1 is the default."""
    if not recording.is_fixed(x, 1):
        return None
    ones = (1,) * len(padding)
    channels = recording.shape_of[x][1]
    mode = padding_mode if any(amount for pair in padding for amount in pair) else "zeros"
    geometry = Geometry(channels, channels, kernel or ones, stride or ones, padding, ones, channels, mode)
    identical = geometry == Geometry.identity(channels, len(padding)) and value == 1
    return Same(x) if identical else Through(x, Filter(geometry, value, fill))


def is_pad(layer: Filter) -> bool:
    """Whether the filter is a pad by a number, without crops."""
    geometry = layer.geometry
    one_tap = set(geometry.kernel) == set(geometry.stride) == {1} and layer.value == 1
    return one_tap and geometry.padding_mode == "zeros" and min(map(min, geometry.padding)) >= 0
