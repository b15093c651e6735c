"""What each operator does with scales: the law per operator, with its formula beside it.

A value x becomes ``x / s``, with a positive s for each channel. An operator f has a law where its own tensors can be so
changed that ``f(x / s)`` is ``f(x) / t``; the law says what t is, and what becomes of the tensors. It holds at every
size, as the recording does. Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", arXiv 1906.04721, section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from repfuse.algebra.expression import Joined, Scaled, Selected, Sum, Through
from repfuse.algebra.layers import Convolution, Factor, Filter, Normalisation, Offset, Phases
from repfuse.algebra.transposed import TransposedGeometry
from repfuse.equalizing.solving import Along, Numbers, Part, Weight
from repfuse.ops import channels
from repfuse.ops.meaning import Meaning, Rearranged, Same, inputs_of
from repfuse.ops.spelling import Call, is_data, spelled
from repfuse.recording.constants import called

if TYPE_CHECKING:
    from repfuse.equalizing.network import Reading


class Fixed(Exception):
    """All scales of what an operator reads and gives are 1: it has no law, or not here."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


Law = Callable[[fx.Node, Any, "Reading"], Along | None]


def same(_node: fx.Node, meaning: Any, known: Reading) -> Along | None:
    """``y = x``."""
    return known.of(meaning.input)


def through(node: fx.Node, meaning: Any, known: Reading) -> Along | None:
    """A layer or a fixed filter."""
    x, layer = known.of(meaning.input), meaning.layer
    if isinstance(layer, Convolution):
        return convolved(node, meaning, known)
    if x is None:
        return None
    if x.axis != 1 or (isinstance(layer, Filter) and layer.fill != 0):
        raise Fixed("not-homogeneous", "it pads with other numbers than 0, or acts on another axis")
    if not isinstance(layer, Phases):  # ``K * (x / s) = (K * x) / s`` for a depthwise K that is alike for all channels
        return x
    spread = np.repeat(x.scales, prod(layer.geometry.kernel))  # space to depth: each channel becomes several
    return Along(1, spread[list(layer.order)] if layer.order else spread)


def convolved(node: fx.Node, meaning: Any, known: Reading) -> Along:
    """``y / t = (W[o, i] s[i] / t[o]) ⋆ (x / s) + b / t``, with any t; padding with 0 is padding with 0 / s."""
    layer, geometry = meaning.layer, meaning.layer.geometry
    axis = 1 if geometry.ndim else len(known.recording.shape_of[node]) - 1
    read = _along(known.of(meaning.input), axis, geometry.in_channels)
    made = known.scales.new(geometry.out_channels)
    shape = geometry.groups, -1
    transposed = isinstance(geometry, TransposedGeometry)
    weight = Weight(layer.weight, read.reshape(shape), made.reshape(shape), transposed, layer.order)
    bias = [] if layer.bias is None else [Part(layer.bias, np.zeros_like(made), made)]
    known.write(node, weight, *bias)
    return Along(axis, made)


def scaled(node: fx.Node, meaning: Any, known: Reading) -> Along | None:
    """A multiple, a shift or a normalisation, channel by channel."""
    x, by = known.of(meaning.input), meaning.by
    if isinstance(by, Normalisation):
        return normalised(node, meaning, known)
    if x is None or isinstance(by, Factor):  # ``c (x / s) = (c x) / s``
        return x
    assert isinstance(by, Offset)  # ``(c x + b) / s = c (x / s) + b / s``
    if not isinstance(by.by, str) or meaning.axis != x.axis:
        raise Fixed("not-homogeneous", "it adds a number that is not one per channel")
    known.write(node, Part(by.by, np.zeros_like(x.scales), x.scales))
    return x


def normalised(node: fx.Node, meaning: Any, known: Reading) -> Along | None:
    """``y / t = (g s / t) (x / s - m / s) / d + b / t``, with any t; without g, t is s."""
    by, channels = meaning.by, known.recording.shape_of[node][1]
    read = _along(known.of(meaning.input), 1, channels)
    made, one = (read if by.weight is None else known.scales.new(channels)), np.zeros_like(read)
    parts = ((by.weight, read, made), (by.mean, one, read), (by.bias, one, made))
    known.write(node, *(Part(*part) for part in parts if part[0] is not None))
    return Along(1, made)


def selected(_node: fx.Node, meaning: Any, known: Reading) -> Along | None:
    """Some channels have their own scales; places of another axis have all of them."""
    x = known.of(meaning.input)
    return x if x is None or x.axis != meaning.axis else Along(x.axis, x.scales[list(meaning.indices)])


def joined(_node: fx.Node, meaning: Any, known: Reading) -> Along | None:
    """Channels one after the other have their own scales."""
    found = [known.of(x) for x in meaning.inputs]
    if not any(found):
        return None
    sizes = (known.recording.shape_of[x][meaning.axis] for x in meaning.inputs)
    return Along(meaning.axis, np.concatenate([_along(x, meaning.axis, n) for x, n in zip(found, sizes, strict=True)]))


def added(_node: fx.Node, meaning: Any, known: Reading) -> Along | None:
    """``x / s + y / s = (x + y) / s``."""
    return _tied([known.of(x) for x in inputs_of(meaning)], known)


def moved(node: fx.Node, meaning: Any, known: Reading) -> Along | None:
    """Pixels elsewhere, or means of them; of several channels, where pixels of those become pixels of one."""
    x = known.of(meaning.input)
    axis = None if x is None else dict(meaning.moves).get(x.axis)
    if x is None or axis is None:
        return flattened(node, meaning, known)
    scales = x.scales
    if meaning.channels:
        to = np.asarray(meaning.channels)
        first = np.unique(to, return_index=True)[1]
        known.scales.tie(scales, scales[first][to])
        scales = scales[first]
    return Along(axis, scales)


def flattened(node: fx.Node, _meaning: Any, known: Reading) -> Along | None:
    """``[N, C, H, W]`` as ``[N, C * H * W]``: each channel's scale for all of its pixels."""
    x, recording = known.of(node.all_input_nodes[0]), known.recording
    if x is None:
        return None
    before, after = recording.shapes(node.all_input_nodes[0]), recording.shapes(node)
    whole = all((a[0], prod(a[1:])) == b for a, b in zip(before, after, strict=False)) and len(before) == len(after)
    if x.axis != 1 or not whole or not recording.is_fixed(node, 1):
        raise Fixed("not-homogeneous", "its channels get to other axes")
    return Along(1, np.repeat(x.scales, prod(after[0][1:]) // len(x.scales)))


def homogeneous(node: fx.Node, _meaning: Any, known: Reading) -> Along | None:
    """``f(x / s) = f(x) / s`` for each number: rectifiers of whatever slopes, magnitudes."""
    return known.of(_only(node, known))


def clamped(node: fx.Node, meaning: Any, known: Reading) -> Along | None:
    """``max(x / s, 0) = max(x, 0) / s``, and so for minima; between other bounds it is no such thing."""
    bounds = (*node.args[1:], *node.kwargs.values())
    if any(bound is not None and not (type(bound) in (int, float) and bound == 0) for bound in bounds):
        raise Fixed("not-homogeneous", "its bounds are not 0")
    return homogeneous(node, meaning, known)


def pooled(node: fx.Node, _meaning: Any, known: Reading) -> Along | None:
    """The largest of some pixels, or their mean: ``max(x / s) = max(x) / s`` in each channel."""
    given = _only(node, known)
    x, shape_of = known.of(given), known.recording.shape_of
    if x is not None and (x.axis != 1 or shape_of[given][:2] != shape_of.get(node, ())[:2]):
        raise Fixed("not-homogeneous", "it acts on another axis than that of pixels")
    return x


def extreme(node: fx.Node, _meaning: Any, known: Reading) -> Along | None:
    """As ``pooled``, over whole axes."""
    names = ("dim", "keepdim")
    given = dict(zip(("input", *names), node.args, strict=False)) | node.kwargs
    known_input = is_data(given.get("input"), known.recording)
    meaning = channels.mean(Call(node, "mean", given), known.recording) if known_input else None
    if not isinstance(meaning, Rearranged):
        raise Fixed("not-homogeneous", "it compares channels with each other")
    return moved(node, meaning, known)


def gated(node: fx.Node, _meaning: Any, known: Reading) -> Along | None:
    """``(x / s) g = (x g) / s`` and ``(x / s) / g = (x / g) / s``, where g has no scale."""
    call = spelled(node)
    operands = [] if call is None else [call.input, call.get("other")]
    if call is not None and call.operator == "mul":
        operands.sort(key=lambda x: x not in known.along)
    x, *others = operands
    if any(g in known.along for g in others) or call is None or call.get("rounding_mode") is not None:
        raise Fixed("not-homogeneous", "it multiplies or divides what has scales itself, or rounds")
    if x in known.along and known.recording.shape_of[node] != known.recording.shape_of[x]:
        raise Fixed("not-homogeneous", "it enlarges what has scales")
    return known.of(x)


def _only(node: fx.Node, known: Reading) -> fx.Node:
    """Return the one value that a node reads, which comes first."""
    given = known.data(node)
    if len(given) != 1 or given[0] is not next(iter(node.args), None):
        raise Fixed("not-homogeneous", "it reads several values")
    return given[0]


def _along(x: Along | None, axis: int, size: int) -> Numbers:
    """Return the scales along this axis, 1 where there are none."""
    if x is not None and (x.axis != axis or len(x.scales) != size):
        raise Fixed("not-homogeneous", "it acts along another axis")
    return np.zeros(size, np.int64) if x is None else x.scales


def _tied(found: list[Along | None], known: Reading) -> Along | None:
    """Let all have the scales of the first."""
    first, *others = found
    for x in others:
        if first is None or x is None:
            if first is not x:
                raise Fixed("fixed-scale", "it is added to, or beside, what has the scale 1")
        elif x.axis != first.axis or len(x.scales) != len(first.scales):
            raise Fixed("not-homogeneous", "what it reads has its channels along different axes")
        else:
            known.scales.tie(first.scales, x.scales)
    return first


OF_MEANINGS: dict[type, Law] = {
    Same: same,
    Through: through,
    Scaled: scaled,
    Selected: selected,
    Joined: joined,
    Sum: added,
    Rearranged: moved,
}
"""By what a node means to the planner."""

OF_OPERATORS: dict[str, Law] = {
    **dict.fromkeys(("relu", "leaky_relu", "prelu", "abs"), homogeneous),
    **dict.fromkeys(("clamp", "clip", "clamp_min", "clamp_max"), clamped),
    **{f"{kind}_pool{ndim}d": pooled for kind in ("max", "adaptive_max", "avg") for ndim in (1, 2, 3)},
    **dict.fromkeys(("amax", "amin"), extreme),
    **dict.fromkeys(("mul", "multiply", "div", "divide", "true_divide", "truediv"), gated),
    **dict.fromkeys(("flatten", "view", "reshape"), flattened),
}
"""By its name, where it means nothing to the planner."""


def law_of(node: fx.Node, meaning: Meaning | None) -> Law:
    """Return the law of a node."""
    return OF_MEANINGS.get(type(meaning)) or OF_OPERATORS.get(called(node).rstrip("_")) or none


def none(_node: fx.Node, _meaning: Any, _known: Reading) -> Along | None:
    """No law is known of any other operator."""
    raise Fixed("not-homogeneous", "it does not take positive factors through itself, as far as is known")
