"""Linear layers and other products with a constant matrix: layers without space, along one axis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from repfuse.algebra.expression import Through, on_axes
from repfuse.algebra.geometry import Geometry, Ints
from repfuse.algebra.layers import Convolution, Factor
from repfuse.ops.channels import VIEWS, with_new_axes
from repfuse.ops.convolution import layer_tensors, refused_as_fake
from repfuse.ops.indexing import channels_last
from repfuse.ops.meaning import Meaning, Rearranged, Same, Unfusible
from repfuse.ops.spelling import (
    SPREADING,
    Call,
    Constant,
    axes_turned,
    axis_of,
    constant,
    is_channel_axis,
    is_data,
    number,
    spelled,
)
from repfuse.ops.sums import by_constant
from repfuse.recording.recording import Recording


def linear(call: Call, recording: Recording) -> Meaning | None:
    """``y = x W^T + b`` along the last axis, with W of shape ``[C_out, C_in]``, a constant."""
    tensors = layer_tensors(call, recording)
    return tensors if isinstance(tensors, Unfusible) else _linear(call.input, *tensors)


def product(call: Call, recording: Recording) -> Meaning | None:
    """``x @ W.T`` is the linear layer of W along the last axis, and ``W @ x`` one along the axis before it."""
    x, other = call.input, call.get("other")
    if (matrix := _matrix(x, other, recording)) is None:
        return _times(x, other, None, recording)
    rank = len(recording.shape_of[other]) if is_data(other, recording) else 0
    usable = len(matrix.shape) <= rank
    return refused_as_fake(x) or (_mixed(other, matrix, rank - 2, (-2, -1), recording) if usable else None)


def biased_product(call: Call, recording: Recording) -> Meaning | None:
    """``b + x @ W.T``, as exported graphs write a linear layer."""
    bias = constant(call.input, recording)
    plain = number(call.get("beta", 1)) == number(call.get("alpha", 1)) == 1
    x = call.get("mat1")
    if bias is None or not plain or not is_data(x, recording):
        return None
    return _times(x, call.get("mat2"), bias, recording)


def tensordot(call: Call, recording: Recording) -> Meaning | None:
    """A sum over the last axis of a tensor and an axis of a matrix: a linear layer."""
    x, other = call.input, call.get("other")
    dims = call.get("dims", (call.get("dims_self", ()), call.get("dims_other", ())))  # by ATen's names
    matrix, rank = constant(other, recording), len(recording.shape_of[x])
    if dims == 1:
        dims = [rank - 1], [0]
    axes = [axis for each in dims for axis in each] if isinstance(dims, list | tuple) else []
    if matrix is None or len(matrix.shape) != 2 or len(axes) != 2 or call.get("out") is not None:
        return None
    last, summed = axis_of(axes[0], rank), axis_of(axes[1], 2)
    if last != rank - 1:
        return Unfusible("channel-mismatch", "the channels of the result are along another axis")
    # An axis of size 1, of either, would be added up with all of the other's.
    if summed is None or matrix.shape[summed] != recording.shape_of[x][last] or not recording.is_fixed(x, last):
        return None
    return refused_as_fake(other) or _linear(x, matrix, None, (1 - summed, summed))


def einsum(call: Call, recording: Recording) -> Meaning | None:
    """``einsum`` of a tensor and a constant that takes a sum over one letter and puts another into its place: a layer.

    ``bchw,kc->bkhw`` is a 1x1, whatever the letters are; ``bchw,c->bchw`` takes no sum and is a scale per channel.
    """
    given = _operands(call, recording)
    if given is None:
        return None
    x, other, matrix, (data, fixed, result) = given
    if result == data and len(fixed) == 1:
        return by_constant(x, matrix, Factor(matrix.name), recording, data.index(fixed))
    lost, found = set(data) - set(result), set(result) - set(data)
    if len(lost) != 1 or len(found) != 1 or not lost <= set(fixed):
        return None
    old, new = *lost, *found
    axis = data.index(old)
    if result != data.replace(old, new):
        return Unfusible("channel-mismatch", "the channels of the result are along another axis")
    if set(fixed) != {old, new}:
        return Unfusible("broadcast", "the weight is another one from place to place")
    order = (fixed.index(new), fixed.index(old))
    # An axis of size 1, of either, would do for all places of the other's: a layer does not take that.
    same = matrix.shape[order[1]] == recording.shape_of[x][axis] and recording.is_fixed(x, axis)
    sure = same and (axis == 1 or channels_last(x, x, recording))
    return refused_as_fake(other) or (_mixed(x, matrix, axis, order, recording) if sure else None)


def _operands(call: Call, recording: Recording) -> tuple[fx.Node, Any, Constant, list[str]] | None:
    """Return the tensor and the constant of an ``einsum`` of two, as given and as such, and the letters of both."""
    operands = call.get("operands")
    if not isinstance(operands, list | tuple) or len(operands) != 2:
        return None
    place = 1 if constant(operands[0], recording) is not None else 0
    x, matrix = operands[place], constant(operands[1 - place], recording)
    if not is_data(x, recording) or matrix is None:
        return None
    letters = _letters(call.get("equation"), len(recording.shape_of[x]), place)
    fits = letters is not None and len(letters[1]) == len(matrix.shape)
    return (x, operands[1 - place], matrix, letters) if letters is not None and fits else None


def _letters(equation: Any, rank: int, data: int) -> list[str] | None:
    """Return the letters of the operand at ``data``, of this rank, of the other and of the result: one for each axis,
    none twice in one of them, digits for an ellipsis.
    """
    if not isinstance(equation, str):
        return None
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    hidden = "0123456789"[: rank - len(terms[data].replace("...", ""))]
    if not arrow:  # all letters that stand once, in the order of the alphabet, after the ellipsis
        once = sorted(letter for letter in set(inputs) - set(".,") if inputs.count(letter) == 1)
        result = "..." * ("..." in inputs) + "".join(once)
    found = [term.replace("...", hidden) for term in (terms[data], terms[1 - data], result)]
    return found if all(len(set(term)) == len(term) for term in found) else None


# A linear layer between what puts the channels last and what puts them back.
#
# With P for what makes a row of each pixel's channels, ``P^-1 ((P x) W^T + 1 b^T)`` is a 1x1.


@dataclass(frozen=True)
class Turned:
    """``last`` puts back what a linear layer computes, and ``meaning`` is that of both and what is before them; that
    goes through the nodes ``inner``.
    """

    last: fx.Node
    meaning: Meaning
    inner: Sequence[fx.Node]


def between_turns(known: Mapping[fx.Node, Meaning | None], recording: Recording) -> list[Turned]:
    """Return the linear layers that are a 1x1 with what is around them, where nothing else reads the rows."""
    found = [turned for node in known if (turned := _turned(node, known, recording)) is not None]
    kept: list[Turned] = []
    while len(kept) != len(found):
        kept, inner = found, {node for turned in found for node in (turned.last, *turned.inner)}
        found = [turned for turned in kept if all(inner.issuperset(_readers(x, recording)) for x in turned.inner)]
    return found


def _turned(node: fx.Node, known: Mapping[fx.Node, Meaning | None], recording: Recording) -> Turned | None:
    match known[node]:
        case Through(x, Convolution() as layer) if layer.geometry.is_pointwise:
            axis, most, found, before = _channel_axis(layer.geometry.ndim), -1, None, [x]
        case _:
            return None
    while isinstance(turn := known.get(before[0]), Same | Rearranged) and _is_turn(before[0], recording):
        before, after = [turn.input, *before], [node]
        spaces = [ndim for ndim in (len(recording.shape_of[before[0]]) - 2, 0) if most < ndim <= 3]
        while len(readers := _readers(after[-1], recording)) == 1 and _is_turn(readers[0], recording):
            after += readers
            fit = (ndim for ndim in spaces if _is_pointwise(before, after, (_channel_axis(ndim), axis), recording))
            if (ndim := next(fit, None)) is not None:
                most, row = ndim, [*before, *after]
                through = Through(row[0], on_axes(layer, ndim))
                found = Turned(row[-1], through, row[1:-1])
                break
    return found


def _channel_axis(ndim: int) -> int:
    return 1 if ndim else -1


def _readers(node: fx.Node, recording: Recording) -> list[fx.Node]:
    """Return what reads more of a node than its sizes."""
    return [user for user in node.users if user in recording.shape_of]


def _is_turn(node: fx.Node, recording: Recording) -> bool:
    """Whether a node has the values of its input, each once: in another shape, or its axes in another order."""
    call = spelled(node)
    if call is None or not is_data(call.input, recording):
        return False
    if call.operator == "getitem":
        return with_new_axes(call, recording) is not None
    turns = axes_turned(call, len(recording.shape_of[call.input])) is not None
    return turns or call.operator in (*VIEWS, "view_as", "squeeze", "unsqueeze", "contiguous", "clone")


def _is_pointwise(
    before: Sequence[fx.Node], after: Sequence[fx.Node], axes: tuple[int, int], recording: Recording
) -> bool:
    """Whether each row that a layer gets is the channels of one pixel of the first node, and what it makes of that, the
    first ``after``, goes back to the pixel. ``axes`` are those of the channels, there and in the layer.
    """
    nodes = (*before, *after)
    shapes = [recording.all_shapes(node) for node in nodes]
    of_one_rank = axes[0] != -1
    if len({len(each) for each in shapes}) > 1 or (of_one_rank and any(map(recording.shapes_at_other_ranks, nodes))):
        return False
    turns = [tuple(_orders(node, each)) for node, each in zip(nodes, shapes, strict=True)]
    steps = [*turns[1 : len(before)], *turns[len(before) + 1 :]]
    runs = zip(zip(*shapes, strict=True), zip(*steps, strict=True), strict=True)
    return all(_goes_back(run, len(before) - 1, orders, axes) for run, orders in runs)


def _orders(node: fx.Node, shapes: Iterable[Ints]) -> Iterator[Ints]:
    """Yield the order of the axes after a turn, for each shape of what it makes; none of a view."""
    call = spelled(node)
    return (tuple((call and axes_turned(call, len(shape))) or ()) for shape in shapes)


@cache
def _goes_back(shapes: tuple[Ints, ...], count: int, turns: tuple[Ints, ...], axes: tuple[int, int]) -> bool:
    """Whether the turns, the first ``count`` of which are before a layer, leave each pixel where it was: by what they
    do to the number of each. ``shapes`` are those of the input, of what the turns make, and of what the layer makes.
    """
    (at, axis), whole, made = axes, shapes[0], shapes[count + 1]
    found, channels = _turn(_numbered(whole, at), shapes[1 : count + 1], turns[:count]), whole[at]
    rows = np.moveaxis(found, axis, -1)
    row = rows[..., :1] // channels
    if not np.array_equal(rows, row * channels + np.arange(channels)):
        return False
    back = np.moveaxis(row * made[axis] + np.arange(made[axis]), -1, axis)
    wanted = list(whole)
    wanted[at] = made[axis]
    return np.array_equal(_turn(back, shapes[count + 2 :], turns[count:]), _numbered(wanted, at))


def _numbered(shape: Sequence[int], at: int) -> NDArray[np.int64]:
    """Return a number for each place: pixel by pixel, and of one channel by channel, which lie along an axis."""
    sizes = list(shape)
    channels = sizes.pop(at)
    return np.moveaxis(np.arange(prod(shape)).reshape(*sizes, channels), -1, at)


def _turn(numbers: NDArray[np.int64], shapes: Sequence[Ints], orders: Sequence[Ints]) -> NDArray[np.int64]:
    for shape, order in zip(shapes, orders, strict=True):
        numbers = numbers.transpose(order) if order else numbers.reshape(shape)
    return numbers


def _times(x: fx.Node, other: Any, bias: Constant | None, recording: Recording) -> Meaning | None:
    """``x @ other + bias``; where ``other`` is written as a transpose, the weight is what it is the transpose of."""
    if (weight := _transposed(other, recording)) is not None:
        return refused_as_fake(other) or _linear(x, weight, bias)
    matrix = _matrix(other, x, recording)
    if matrix is None or len(matrix.shape) > len(recording.shape_of[x]):
        return None
    return refused_as_fake(other) or _linear(x, matrix, bias, (-1, -2))


def _linear(x: fx.Node, weight: Constant, bias: Constant | None, order: Ints = ()) -> Meaning | None:
    if not order and len(weight.shape) != 2:
        return None
    outputs, inputs = (weight.shape[axis] for axis in order or (0, 1))
    if bias is not None and bias.shape != (outputs,):
        return Unfusible("broadcast", "the bias of a linear layer is not one number per channel")
    shape = Geometry(inputs, outputs, (), (), (), ())
    return Through(x, Convolution(shape, weight.name, None if bias is None else bias.name, _whole(order, weight)))


def _mixed(x: fx.Node, weight: Constant, axis: int, order: Ints, recording: Recording) -> Meaning | None:
    """A layer along ``axis``: a 1x1, or where the channels are last, a linear layer."""
    rank = len(recording.shape_of[x])
    if not is_channel_axis(axis, rank):
        return None
    if axis == rank - 1:
        return _linear(x, weight, None, order)
    if rank > 5:
        return None
    ones = (1,) * (rank - 2)
    outputs, inputs = (weight.shape[place] for place in order)
    point = Geometry(inputs, outputs, ones, ones, ((0, 0),) * len(ones), ones)
    return Through(x, Convolution(point, weight.name, None, _whole(order, weight)))


def _whole(order: Ints, weight: Constant) -> Ints:
    """Return the order with the leading axes of size 1 of the tensor."""
    rank = len(weight.shape)
    return (*range(rank - 2), *(axis % rank for axis in order)) if order else ()


def _matrix(value: Any, other: Any, recording: Recording) -> Constant | None:
    """Return the constant matrix that ``value`` is, or holds once for each of a batch: ``W.expand(n, -1, -1)``.

    The size n is that of ``other``, the tensor that it is multiplied with.
    """
    call = spelled(value) if isinstance(value, fx.Node) else None
    if call is not None and call.operator in SPREADING:
        before = constant(call.input, recording)
        same = before is not None and recording.shape_of[call.node][-2:] == before.shape[-2:]
        matrix = before if same and _measured(call.node, recording) <= {call.input, other} else None
    else:
        matrix = constant(value, recording)
    usable = matrix is not None and len(matrix.shape) >= 2 and prod(matrix.shape[:-2]) == 1
    return matrix if usable else None


def _transposed(value: Any, recording: Recording) -> Constant | None:
    """Return the constant matrix whose transpose ``value`` is."""
    call = spelled(value) if isinstance(value, fx.Node) else None
    matrix = None if call is None else constant(call.input, recording)
    if call is None or matrix is None or len(matrix.shape) != 2:
        return None
    return matrix if axes_turned(call, 2) == [1, 0] else None


def _measured(node: fx.Node, recording: Recording) -> set[fx.Node]:
    """Return the tensors that a node is given, and those whose sizes it is given."""
    found: set[fx.Node] = set()
    for x in node.all_input_nodes:
        found |= {x} if x in recording.shape_of else _measured(x, recording)
    return found
