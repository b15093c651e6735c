"""Sums, differences, multiples and means, with the constants in them; normalisations with frozen statistics.

A sum is ``a * one + b * other`` with numbers a and b; what the operands are decides:

    tensor and tensor       a sum: a * x + b * y
    tensor and constant     x scaled: a * x + b * c, where c is one number per channel
    tensor and number       the same with one number; a number 0, with which ``sum([...])`` begins, adds nothing
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import fx

from repfuse.algebra.expression import Scaled, Sum
from repfuse.algebra.layers import Factor, Normalisation, Offset
from repfuse.ops.meaning import Combination, Meaning, Passage, Same, Unfusible, combination, terms_of
from repfuse.ops.spelling import (
    Call,
    Constant,
    axis_of,
    constant,
    is_channel_axis,
    is_data,
    makes_zeros,
    number,
    operator_of,
    spelled,
    spread,
)
from repfuse.recording.recording import Recording

# When a constant that is broadcast over a tensor is one number per channel.


Shape = tuple[int, ...]

ARITHMETIC = frozenset({"add", "sub", "rsub", "mul", "div"})
"""Operators that compute a new tensor even where a 0 or a 1 makes no difference to its numbers."""


def axis_of_constant(constant: Shape, x: Shape) -> int | Unfusible | None:
    """Return the axis of ``x`` along which alone a constant of this shape varies; None where it is one number.

    Shapes are aligned at their last axes. The constant must not make the result larger than ``x``, for any size of
    ``x``: it has no more axes than ``x`` and varies along axis 1 or the last axis alone, with as many numbers as ``x``
    has there.
    """
    if len(constant) > len(x):
        return Unfusible("broadcast", f"a constant of shape {constant} enlarges a tensor of {len(x)} axes")
    if math.prod(constant) == 1:
        return None
    aligned = (1,) * (len(x) - len(constant)) + constant
    varying = [axis for axis, size in enumerate(aligned) if size != 1]
    if len(varying) != 1 or not is_channel_axis(varying[0], len(x)) or aligned[varying[0]] != x[varying[0]]:
        return Unfusible("broadcast", f"a constant of shape {constant} is not one number per channel of {x}")
    return varying[0]


def add(call: Call, recording: Recording, sign: float = 1.0) -> Meaning | None:
    """``input + alpha * other``, or the difference, by the ``sign``."""
    alpha = number(call.get("alpha", 1))
    terms = (call.input, 1.0), (call.get("other"), sign * (alpha or 0.0))
    return None if alpha is None else _combination(terms, recording, call)


def rsub(call: Call, recording: Recording) -> Meaning | None:
    """``other - alpha * input``."""
    alpha = number(call.get("alpha", 1))
    terms = (call.input, -(alpha or 0.0)), (call.get("other"), 1.0)
    return None if alpha is None else _combination(terms, recording, call)


def lerp(call: Call, recording: Recording) -> Meaning | None:
    """``(1 - weight) * input + weight * end``; ``input - weight * input + weight * end`` where that is a constant."""
    x, end, weight = call.input, call.get("end"), number(call.get("weight"))
    if weight is not None:
        return _combination(((x, 1 - weight), (end, weight)), recording, call)
    by = constant(call.get("weight"), recording)
    if by is None or not (is_data(x, recording) and is_data(end, recording)):
        return None
    less = by_constant(x, by, Factor(by.name, times=-1.0), recording)
    more = by_constant(end, by, Factor(by.name), recording)
    if not isinstance(less, Scaled):
        return less
    return _of_one_shape(Sum((x, less, more)), recording) if isinstance(more, Scaled) else more


def addcmul(call: Call, recording: Recording) -> Meaning | None:
    """``input + value * tensor1 * tensor2``, one of the factors a constant: a scale, and a sum or a shift."""
    x, other, scale = call.input, call.get("tensor1"), call.get("tensor2")
    if not is_data(other, recording):
        other, scale = scale, other
    factor, shift, value = constant(scale, recording), constant(x, recording), number(call.get("value", 1))
    if factor is None or not is_data(other, recording) or value is None:
        return None
    scaled = by_constant(other, factor, Factor(factor.name, times=value), recording)
    if not isinstance(scaled, Scaled):
        return scaled
    if is_data(x, recording):
        return _of_one_shape(Sum((x, scaled)), recording)
    if shift is None or call.in_place or value != 1:
        return None
    shifted = by_constant(other, shift, Offset(shift.name, scale=factor.name), recording)
    if isinstance(shifted, Scaled) and len({scaled.axis, shifted.axis} - {None}) == 2:
        return Unfusible("broadcast", "a scale along one axis and a shift along another")
    return replace(shifted, axis=scaled.axis) if isinstance(shifted, Scaled) and shifted.axis is None else shifted


def neg(call: Call, _recording: Recording) -> Meaning | None:
    """``-input``."""
    return _multiple(call.input, -1.0)


def mul(call: Call, recording: Recording) -> Meaning | None:
    """``input * other``, one of them a number or a constant."""
    x, by = call.input, call.get("other")
    if not is_data(x, recording) or _is_spread_over(x, by, recording):
        x, by = by, x
    if not is_data(x, recording) or (call.in_place and x is not call.input):
        return None
    factor, tensor = number(by), _constant_over(by, x, recording)
    if factor is not None:
        return _multiple(x, factor)
    return None if tensor is None else by_constant(x, tensor, Factor(tensor.name), recording)


def div(call: Call, recording: Recording) -> Meaning | None:
    """``input / other`` by a number or a constant, without rounding."""
    x, by = call.input, call.get("other")
    if call.get("rounding_mode") is not None:
        return None
    divisor, tensor = number(by), _constant_over(by, x, recording)
    if divisor is not None:
        return None if divisor == 0 else _multiple(x, 1.0 / divisor)
    return None if tensor is None else by_constant(x, tensor, Factor(tensor.name, True), recording)


def stack(call: Call, recording: Recording) -> Meaning | None:
    """A stack that is only read by sums and means over its new axis, which name the parts themselves."""
    users = [spelled(user) for user in call.node.users]
    if users and all(user is not None and _reduces(user, call, recording) for user in users):
        return Passage()
    return None


def total(call: Call, recording: Recording) -> Meaning | None:
    """``stack([a, b, ...], d).sum(d) = a + b + ...``, and the mean is that sum divided by its length."""
    producer = spelled(call.input) if isinstance(call.input, fx.Node) else None
    if producer is None or producer.operator != "stack" or not _reduces(call, producer, recording):
        return None
    parts = producer.get("tensors")
    factor = 1.0 if call.operator == "sum" else 1.0 / len(parts)
    return combination(*((part, factor) for part in parts))


def _reduces(call: Call, producer: Call, recording: Recording) -> bool:
    """Whether ``call`` sums over the axis that the stack ``producer`` made, and drops it."""
    parts = producer.get("tensors")
    if call.operator not in ("sum", "mean") or call.input is not producer.node or not isinstance(parts, list | tuple):
        return False
    if not parts or not all(is_data(part, recording) for part in parts):
        return False
    plain = call.get("keepdim", False) is False and call.get("dtype") is None
    rank = len(recording.shape_of[parts[0]]) + 1
    dims = call.get("dim")
    dim = dims[0] if isinstance(dims, list | tuple) and len(dims) == 1 else dims
    axis = axis_of(dim, rank)
    return plain and axis is not None and axis == axis_of(producer.get("dim", 0), rank)


def _combination(
    terms: tuple[tuple[Any, float], tuple[Any, float]], recording: Recording, call: Call
) -> Meaning | None:
    (x, factor), (y, y_factor) = terms
    for zeros, other, by in ((y, x, factor), (x, y, y_factor)):
        if isinstance(zeros, fx.Node) and is_data(other, recording) and _adds_nothing(zeros, other, call, recording):
            return _multiple(other, by)
    if _is_spread_over(x, y, recording) and not call.in_place:
        (x, factor), (y, y_factor) = (y, y_factor), (x, factor)
    if is_data(x, recording) and is_data(y, recording) and not _is_spread_over(y, x, recording):
        return _of_one_shape(combination((x, factor), (y, y_factor)), recording)
    if not is_data(x, recording):
        if call.in_place or not is_data(y, recording):
            return None
        (x, factor), (y, y_factor) = (y, y_factor), (x, factor)
    amount = number(y)
    if amount is not None:
        shift = amount * y_factor
        return Scaled(x, Offset(shift, scale=factor)) if shift else _multiple(x, factor)
    tensor = _constant_over(y, x, recording)
    return None if tensor is None else by_constant(x, tensor, Offset(tensor.name, y_factor, factor), recording)


def _of_one_shape(found: Combination, recording: Recording) -> Meaning:
    """Return a sum, if all that it adds up has one shape."""
    shapes = {recording.shape_of[term.input] for term in terms_of(found)}
    return found if len(shapes) == 1 else Unfusible("broadcast", "a sum of tensors of different shapes")


def _constant_over(value: Any, x: fx.Node, recording: Recording) -> Constant | None:
    """Return the constant that ``value`` is, or is once for each place of ``x``: which broadcasting would do, too."""
    return spread(value, recording) if _is_spread_over(value, x, recording) else constant(value, recording)


def _is_spread_over(value: Any, x: Any, recording: Recording) -> bool:
    """Whether ``value`` is a constant once for each place of ``x``, and makes nothing larger that it meets."""
    if spread(value, recording) is None or not is_data(x, recording):
        return False
    own, others = map(recording.all_shapes, (value, x))
    return len(own) == len(others) and all(
        len(a) <= len(b) and all(n in (1, m) for n, m in zip(a[::-1], b[::-1], strict=False))
        for a, b in zip(own, others, strict=True)
    )


def _adds_nothing(zeros: fx.Node, other: fx.Node, call: Call, recording: Recording) -> bool:
    """Whether ``zeros`` is made of zeros, which are still there, and no larger than ``other``."""
    order = recording.order
    kept = all(order[writer] >= order[call.node] for writer in recording.memory.writers(zeros))
    return makes_zeros(zeros) and kept and recording.shapes(call.node) == recording.shapes(other)


def by_constant(
    x: fx.Node, tensor: Constant, by: Factor | Offset, recording: Recording, axis: int | None = None
) -> Meaning:
    """Return ``x`` scaled or shifted by a constant, which is broadcast, or has one number per place of ``axis``."""
    shape = recording.shape_of[x]
    along = tensor.shape if axis is None else (*tensor.shape, *(1,) * (len(shape) - 1 - axis))
    found = axis_of_constant(along, shape)
    if isinstance(found, int) and not recording.is_fixed(x, found):
        return Unfusible("broadcast", "a constant of one number per place of an axis that other inputs have longer")
    return found if isinstance(found, Unfusible) else Scaled(x, by, found)


def _multiple(x: fx.Node, factor: float) -> Meaning:
    return Same(x) if factor == 1 else combination((x, factor))


# Normalisations with frozen statistics: ``y = weight * (x - mean) / sqrt(var + eps) + bias``, channel by channel.
#
# Instance normalisation that tracks statistics uses them in inference, and is then the same map.


_TENSORS = ("running_mean", "running_var", "weight", "bias")
_DEFAULT_EPS = 1e-5
NATIVE_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training")
"""Normalisations that return their result with the statistics."""


def native_batch_norm(call: Call, recording: Recording) -> Meaning | None:
    """ATen's normalisation, which returns its result with the statistics; ``normalised_part`` is the result."""
    meaning = norm(call, recording)
    read = all(_is_first_part(user, call.node) for user in call.node.users if user.users)
    return Passage() if isinstance(meaning, Scaled) and read else None


def normalised_part(call: Call, producer: Call, recording: Recording) -> Meaning | None:
    """Part 0 of what ``native_batch_norm`` returns."""
    return norm(producer, recording) if call.get("index") == 0 else None


def normalises(node: fx.Node, recording: Recording) -> bool:
    """Whether a node is what a batch or instance normalisation of data returns."""
    call = spelled(node) if operator_of(node) in ("batch_norm", "instance_norm", "getitem") else None
    if call is not None and call.operator == "getitem" and call.get("index") == 0 and isinstance(call.input, fx.Node):
        producer = spelled(call.input)
        return producer is not None and producer.operator in NATIVE_NORMS and is_data(producer.input, recording)
    return call is not None and call.operator != "getitem" and is_data(call.input, recording)


def _is_first_part(user: fx.Node, node: fx.Node) -> bool:
    call = spelled(user)
    return call is not None and call.operator == "getitem" and call.input is node and call.get("index") == 0


def norm(call: Call, recording: Recording) -> Meaning | None:
    """Batch normalisation, or instance normalisation: affine where it does not use the statistics of its input."""
    x, given = call.input, [call.get(name) for name in _TENSORS]
    if not is_data(x, recording) or len(recording.shape_of[x]) < 2:
        return None
    instance = call.operator == "instance_norm"
    by_batch = call.get("use_input_stats", True) if instance else call.get("training", False)
    if by_batch is not False or given[0] is None or given[1] is None:
        return Unfusible("training-norm", "the normalisation uses the statistics of the batch")
    tensors = [constant(tensor, recording) for tensor in given]
    if any(tensor is None for tensor, argument in zip(tensors, given, strict=True) if argument is not None):
        return Unfusible("computed-weight", "statistics or affine parameters of the normalisation depend on the input")
    if any(tensor is not None and tensor.shape != recording.shape_of[x][1:2] for tensor in tensors):
        return Unfusible("broadcast", "the normalisation has another number of statistics than there are channels")
    eps = number(call.get("eps", _DEFAULT_EPS))
    if eps is None:
        return Unfusible("computed-weight", "the eps of the normalisation is computed in forward")
    mean, var, weight, bias = (None if tensor is None else tensor.name for tensor in tensors)
    return Scaled(x, Normalisation(str(mean), str(var), weight, bias, eps), axis=1)
