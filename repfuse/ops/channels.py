"""What puts values elsewhere: parts, joins and shuffles of channels; flatten, transpose, mean over space."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from repfuse.algebra.expression import Joined, Selected, Through
from repfuse.algebra.geometry import Ints
from repfuse.algebra.layers import Phases
from repfuse.ops.indexing import entries_of, is_whole
from repfuse.ops.meaning import Meaning, Passage, Rearranged, Same
from repfuse.ops.spelling import (
    TURNING,
    Call,
    axes_turned,
    axis_of,
    contains_node,
    is_channel_axis,
    is_data,
    is_integer,
    spelled,
)
from repfuse.recording.constants import takes_all
from repfuse.recording.recording import Recording

# Concatenations and splits along the channels.


VIEWS = ("view", "flatten", "unflatten")
"""Operators that put the same numbers, in the same order, into a shape that they are given."""
PIECES = frozenset({"chunk", "split", "tensor_split"})
"""Operators that return a list of parts of a tensor."""


def cat(call: Call, recording: Recording) -> Meaning | None:
    """The channels of several tensors, one after the other."""
    tensors = call.get("tensors")
    if not isinstance(tensors, list | tuple) or not tensors or not all(is_data(part, recording) for part in tensors):
        return None
    ranks = {len(recording.shape_of[part]) for part in tensors}
    rank = min(ranks)
    axis = axis_of(call.get("dim", 1 if call.operator == "hstack" else 0), rank)
    if len(ranks) > 1 or not is_channel_axis(axis, rank):
        return None
    if not all(recording.is_fixed(part, axis) for part in tensors):
        return None
    return Same(tensors[0]) if len(tensors) == 1 else Joined(tuple(tensors), axis)


def pieces(call: Call, recording: Recording) -> Meaning | None:
    """A list of parts whose readers take one part each; ``piece`` is such a reader."""
    users = [spelled(user) for user in call.node.users]
    taken = all(user is not None and user.operator == "getitem" for user in users)
    return Passage() if users and taken and _parts(call, recording) is not None else None


def piece(call: Call, producer: Call, recording: Recording) -> Meaning | None:
    """One part of a list of parts: a range of channels."""
    found = _parts(producer, recording)
    if found is None:
        return None
    axis, parts = found
    part = parts[call.get("index")]
    return Selected(producer.input, tuple(part), axis) if part else None


def _parts(call: Call, recording: Recording) -> tuple[int, Sequence[Sequence[int]]] | None:
    """Return the axis and the channels of each part, by PyTorch's own rule for the lengths."""
    x, how = call.input, call.get("chunks") if call.operator == "chunk" else call.get("sizes")
    if not is_data(x, recording) or contains_node(how) or not (is_integer(how) or isinstance(how, list | tuple)):
        return None
    shape = recording.shape_of[x]
    axis = axis_of(call.get("dim", 0), len(shape))
    if not is_channel_axis(axis, len(shape)) or not recording.is_fixed(x, axis):
        return None
    rule = {"chunk": torch.chunk, "split": torch.split, "tensor_split": torch.tensor_split}[call.operator]
    return axis, [part.tolist() for part in rule(torch.arange(shape[axis]), how)]


# Axes taken apart and put together: by one operator, or by a view, a transpose and a view.
#
# A view parts an axis into factors and joins factors that lie side by side: what three steps do together shows in where
# each number of the input ends up. Where the channels of a pixel stay together, in another order, it is a shuffle
# (Zhang et al., "ShuffleNet", arXiv 1707.01083, section 3.1); where those of a block of pixels join, it is space to
# depth, and the other way round depth to space. It has to be the same at every size that was recorded.


def shuffle(call: Call, recording: Recording) -> Meaning | None:
    """``channel_shuffle(x, groups)``."""
    x, groups = call.input, call.get("groups")
    if not is_integer(groups) or not recording.is_fixed(x, 1):
        return None
    rank = len(recording.shape_of[x])
    channels = recording.shape_of[x][1] if rank > 2 else 0
    elsewhere = any(len(shape) != rank for shape in recording.shapes_at_other_ranks(x))  # there it shuffles others
    if not channels or elsewhere:
        return None
    return Selected(x, tuple(np.arange(channels).reshape(groups, -1).T.flatten().tolist()), 1)


def unshuffled(call: Call, recording: Recording) -> Meaning | None:
    """``F.pixel_unshuffle(x, factor)``: a stride of ``factor`` whose channels are the taps of the blocks it leaves."""
    x, factor = call.input, call.get("downscale_factor")
    if not _parts_pixels(x, factor, recording):
        return None
    return Same(x) if factor == 1 else Through(x, Phases.of(recording.shape_of[x][1], (factor, factor)))


def shuffled(call: Call, recording: Recording) -> Meaning | None:
    """``F.pixel_shuffle(x, factor)``: ``factor ** 2`` channels in a row become pixels of one."""
    x, factor = call.input, call.get("upscale_factor")
    if not _parts_pixels(x, factor, recording):
        return None
    channels, phases = zip(*(divmod(c, factor**2) for c in range(recording.shape_of[x][1])), strict=True)
    return Rearranged(x, ((1, 1),), channels, phases)


def _parts_pixels(x: Any, factor: Any, recording: Recording) -> bool:
    """Whether ``x`` holds images of a known number of channels, and the factor is a number."""
    known = len(recording.shape_of[x]) == 4 and recording.is_fixed(x, 1)
    return known and is_integer(factor) and factor > 0


def reshaped(call: Call, recording: Recording) -> Meaning | None:
    """Return what a view means: the last of three steps, or one of those before it."""
    steps = _steps(call, recording)
    return passing(call, recording) if steps is None else steps[1]


def passing(call: Call, recording: Recording) -> Passage | None:
    """Return the passage of a step before the last, which nothing else reads."""
    node = call.node
    for _ in range(3):
        if len(node.users) != 1:
            return None
        node = next(iter(node.users))
        last = spelled(node)
        steps = None if last is None else _steps(last, recording)
        if steps is not None and call.node in steps[0]:
            return Passage()
    return None


def _steps(last: Call, recording: Recording) -> tuple[list[fx.Node], Meaning] | None:
    """Return the steps before ``last``, if it is the last one of three, and what all of them come to."""
    turned = _before(last, VIEWS)
    copied = turned if turned is not None and turned.operator in ("contiguous", "clone") else None
    turned = turned if copied is None else _before(copied, ("contiguous", "clone"))
    view = None if turned is None else _before(turned, TURNING)
    if turned is None or view is None or view.operator not in VIEWS or not is_data(view.input, recording):
        return None
    x = view.input
    shapes = [recording.all_shapes(node) for node in (x, view.node, last.node)]
    order = axes_turned(turned, len(shapes[1][0]))
    ranks = [len({len(shape) for shape in each}) for each in shapes]
    if order is None or max(ranks) > 1 or len({len(each) for each in shapes}) > 1:
        return None
    sizes = zip(*shapes, strict=True)
    (found, *others) = {_moved_between(before, parted, tuple(order), after) for before, parted, after in sizes}
    if found is None or others:
        return None
    blocks, places, joins = found
    meaning: Meaning = Selected(x, places, 1)
    if not joins:
        meaning = Rearranged(x, ((1, 1),), tuple(place // prod(blocks) for place in places))
    elif prod(blocks) > 1:
        meaning = Through(x, Phases.of(shapes[0][0][1], blocks, places))
    return [call.node for call in (view, turned, copied) if call is not None], meaning


@cache
def _moved_between(before: Ints, parted: Ints, order: Ints, after: Ints) -> tuple[Ints, Ints, bool] | None:
    """Return the blocks of pixels that join the channels, or come from them, and in which order, if they do."""
    turned = [parted[axis] for axis in order]
    whole = {*np.cumprod(before)} <= {*np.cumprod(parted)} and {*np.cumprod(after)} <= {*np.cumprod(turned)}
    if not whole or len(before) != len(after) or len(before) < 3 or before[0] != after[0]:
        return None
    places = np.arange(prod(before)).reshape(parted).transpose(order).reshape(after)
    if (joined := _blocks(places, before)) is not None:
        return *joined, True
    inverse = np.empty_like(places.ravel())
    inverse[places.ravel()] = np.arange(prod(before))
    return None if (left := _blocks(inverse.reshape(before), after)) is None else (*left, False)


def _blocks(places: NDArray[np.int64], whole: Ints) -> tuple[Ints, Ints] | None:
    """Return the blocks of pixels of a tensor of shape ``whole`` whose numbers have these ``places`` in the channels of
    one pixel, and in which order.
    """
    if any(large % max(small, 1) for large, small in zip(whole[2:], places.shape[2:], strict=True)) or not places.size:
        return None
    blocks = tuple(large // small for large, small in zip(whole[2:], places.shape[2:], strict=True))
    split = [n for pair in zip(places.shape[2:], blocks, strict=True) for n in pair]
    axes = range(2, 2 + len(split))
    apart = np.arange(prod(whole)).reshape(*whole[:2], *split).transpose(0, 1, *axes[1::2], *axes[::2])
    plain = apart.reshape(places.shape)
    one, other = (x[0].reshape(x.shape[1], -1)[:, 0] for x in (plain, places))
    order = np.argsort(one)[np.searchsorted(np.sort(one), other).clip(max=len(one) - 1)]
    return (blocks, tuple(order.tolist())) if np.array_equal(plain[:, order], places) else None


def _before(call: Call, operators: Sequence[str]) -> Call | None:
    usable = call.operator in operators and isinstance(call.input, fx.Node)
    return spelled(call.input) if usable else None


# What moves values, or averages them, alike for every channel.
#
# Write a tensor as rows of C channels, ``X [R, C]``. These operators compute ``P X`` with a matrix P over rows, each of
# whose own rows sums to 1: permutations, choices, means. What acts on channels, ``X -> X W^T + b``, commutes with that:
# ``P (X W^T + 1 b^T) = (P X) W^T + 1 b^T``.


def viewed(call: Call, recording: Recording) -> Meaning | None:
    """The same numbers in the same order, in another shape that keeps the last axis, or the first two."""
    x, y = call.input, call.node
    if recording.dtype_of.get(y) is not recording.dtype_of[x]:
        return None
    before, after = (recording.all_shapes(z) for z in (x, y))
    if len(before) != len(after) or min(map(len, (*before, *after))) < 2:
        return None
    if before == after:
        return Same(x)
    last = len(before[0]) - 1, len(after[0]) - 1
    moves = {}
    if recording.is_fixed(x, 1) and all(a[:2] == b[:2] for a, b in zip(before, after, strict=True)):
        moves[1] = 1
    if recording.is_fixed(x, last[0]) and all(a[-1] == b[-1] for a, b in zip(before, after, strict=True)):
        moves[last[0]] = last[1]
    return _moved(x, moves, view=True)


def with_new_axes(call: Call, recording: Recording) -> Meaning | None:
    """``x[..., None]``: whole axes, and new ones of size 1."""
    index = call.get("index")
    given = index if isinstance(index, tuple) else (index,)
    whole = all(entry is None or takes_all(entry) for entry in given)
    return viewed(call, recording) if whole and None in given and is_data(call.input, recording) else None


def squeezed(call: Call, recording: Recording) -> Meaning | None:
    """Without axes that are 1 at every size: an axis that happens to be 1 goes where its size may be another."""
    x, dims = call.input, call.get("dim")
    dims = [dims] if is_integer(dims) else dims
    if not isinstance(dims, list | tuple):
        return None
    shapes = recording.all_shapes(x)
    gone = ((shape, axis_of(dim, len(shape))) for shape in shapes for dim in dims)
    return viewed(call, recording) if all(axis is not None and shape[axis] == 1 for shape, axis in gone) else None


def permuted(call: Call, recording: Recording) -> Meaning | None:
    """Axes in another order."""
    rank = len(recording.shape_of[call.input])
    order = axes_turned(call, rank) or ()
    return _moved(call.input, {axis: place for place, axis in enumerate(order) if is_channel_axis(axis, rank)})


def reordered(call: Call, recording: Recording) -> Meaning | None:
    """``x.flip(axis)``, ``x.roll(shift, axis)``: the channels in another order; or none of them, and all pixels."""
    x, dims, shifts = call.input, call.get("dims"), call.get("shifts", ())
    dims, shifts = ([each] if is_integer(each) else each for each in (dims, shifts))
    if not isinstance(dims, list | tuple) or not isinstance(shifts, list | tuple) or not dims:
        return None
    rank = len(recording.shape_of[x])
    axes = [axis_of(dim, rank) for dim in dims]
    if len(axes) != 1 or not is_channel_axis(axes[0], rank) or not recording.is_fixed(x, axes[0]):
        return _without(x, {*axes}, rank, keeps=True)
    order = [*range(recording.shape_of[x][axes[0]])]
    if call.operator == "flip":
        return Selected(x, tuple(reversed(order)), axes[0])
    if not is_integer(shifts[0]):
        return None
    return Selected(x, tuple((place - shifts[0]) % len(order) for place in order), axes[0])


def mean(call: Call, recording: Recording) -> Meaning | None:
    """A mean over some axes."""
    x, dims = call.input, call.get("dim")
    dims = [dims] if is_integer(dims) else dims
    keeps = call.get("keepdim", False)
    if not isinstance(dims, list | tuple) or contains_node(dims) or not dims:
        return None
    if call.get("dtype") is not None or not isinstance(keeps, bool):
        return None
    rank = len(recording.shape_of[x])
    return _without(x, {axis_of(dim, rank) for dim in dims}, rank, keeps=keeps)


def picked(call: Call, recording: Recording) -> Meaning | None:
    """One place along some axes: ``x[:, :, 0, 0]``."""
    x, index = call.input, call.get("index")
    given = index if isinstance(index, tuple) else (index,)
    if not is_data(x, recording) or any(isinstance(entry, list) for entry in given):
        return None
    rank = len(recording.shape_of[x])
    entries = entries_of(tuple([entry] if is_integer(entry) else entry for entry in given), rank)
    if entries is None or not all(isinstance(entry, list) or is_whole(entry) for entry in entries):
        return None
    return _without(x, {axis for axis, entry in enumerate(entries) if isinstance(entry, list)}, rank)


def selected(call: Call, recording: Recording) -> Meaning | None:
    """``x.select(dim, index)``: one place along an axis."""
    rank = len(recording.shape_of[call.input])
    usable = is_integer(call.get("index"))
    return _without(call.input, {axis_of(call.get("dim"), rank)}, rank) if usable else None


def adaptive_pool(call: Call, recording: Recording, ndim: int) -> Meaning | None:
    """Means over windows that share the image out."""
    return _moved(call.input, {1: 1}) if len(recording.shape_of[call.input]) == ndim + 2 else None


def resized(call: Call, recording: Recording) -> Meaning | None:
    """``F.interpolate(x, ...)``: each pixel is a mean of some, with weights that sum to 1."""
    return _moved(call.input, {1: 1}) if recording.is_fixed(call.input, 1) else None


def _without(x: fx.Node, gone: set[int | None], rank: int, *, keeps: bool = False) -> Rearranged | None:
    """Axes that are reduced, and gone unless one ``keeps`` them, or whose places are put elsewhere."""
    kept = [axis for axis in range(rank) if keeps or axis not in gone]
    stay = (axis for axis in kept if is_channel_axis(axis, rank) and axis not in gone)
    return None if None in gone else _moved(x, {axis: kept.index(axis) for axis in stay})


def _moved(x: fx.Node, moves: dict[int, int], *, view: bool = False) -> Rearranged | None:
    found = tuple((axis, place) for axis, place in moves.items() if place > 0)
    return Rearranged(x, found, view=view) if found else None


_MEASURING = frozenset({"view_as", "reshape_as", "expand_as"})
_MAKING = frozenset({f"{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn")})


def only_measures(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` takes no more of ``node`` than its shape or its dtype: ``x.reshape_as(node)``."""
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    name = name.partition(".")[0]
    return name in _MAKING or (name in _MEASURING and user.args[0] is not node)
