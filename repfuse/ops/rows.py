"""What puts values elsewhere, or averages them, alike for every channel: flatten, transpose, mean over space.

Write a tensor as rows of C channels, ``X [R, C]``. These operators compute ``P X`` with a matrix P over rows, each of
whose own rows sums to 1: permutations, choices, means. What acts on channels, ``X -> X W^T + b``, commutes with that:
``P (X W^T + 1 b^T) = (P X) W^T + 1 b^T``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from repfuse.ops.call import Call, axes_turned, axis_of, contains_node, is_channel_axis, is_data
from repfuse.ops.indexing import entries_of, is_integer, is_whole
from repfuse.ops.meaning import Meaning, Rearranged

if TYPE_CHECKING:
    from repfuse.recording.recording import Recording


def viewed(call: Call, recording: Recording) -> Meaning | None:
    """The same numbers in the same order, in another shape that keeps the last axis, or the first two."""
    x, y = call.input, call.node
    if not is_data(x, recording) or recording.dtype_of.get(y) is not recording.dtype_of[x]:
        return None
    before, after = (recording.shapes(z) + recording.shapes_at_other_ranks(z) for z in (x, y))
    if len(before) != len(after) or min(map(len, (*before, *after))) < 2:
        return None
    last = len(before[0]) - 1, len(after[0]) - 1
    moves = {}
    if recording.is_fixed(x, 1) and all(a[:2] == b[:2] for a, b in zip(before, after, strict=True)):
        moves[1] = 1
    if recording.is_fixed(x, last[0]) and all(a[-1] == b[-1] for a, b in zip(before, after, strict=True)):
        moves[last[0]] = last[1]
    return _moved(x, moves)


def squeezed(call: Call, recording: Recording) -> Meaning | None:
    """Without axes that are 1 at every size: an axis that happens to be 1 goes where its size may be another."""
    x, dims = call.input, call.get("dim")
    dims = [dims] if is_integer(dims) else dims
    if not is_data(x, recording) or not isinstance(dims, list | tuple):
        return None
    shapes = recording.shapes(x) + recording.shapes_at_other_ranks(x)
    gone = {axis_of(dim, len(recording.shape_of[x])) for dim in dims}
    return viewed(call, recording) if all(shape[axis or 0] == 1 for shape in shapes for axis in gone) else None


def permuted(call: Call, recording: Recording) -> Meaning | None:
    """Axes in another order."""
    x = call.input
    if not is_data(x, recording):
        return None
    rank = len(recording.shape_of[x])
    order = axes_turned(call, rank)
    if order is None:
        return None
    return _moved(x, {axis: place for place, axis in enumerate(order) if is_channel_axis(axis, rank)})


def mean(call: Call, recording: Recording) -> Meaning | None:
    """A mean over some axes."""
    x, dims = call.input, call.get("dim")
    dims = [dims] if is_integer(dims) else dims
    keeps = call.get("keepdim", False)
    if not is_data(x, recording) or not isinstance(dims, list | tuple) or contains_node(dims) or not dims:
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
    x = call.input
    if not is_data(x, recording) or not is_integer(call.get("index")):
        return None
    rank = len(recording.shape_of[x])
    return _without(x, {axis_of(call.get("dim"), rank)}, rank)


def adaptive_pool(call: Call, recording: Recording, ndim: int) -> Meaning | None:
    """Means over windows that share the image out."""
    x = call.input
    if not is_data(x, recording) or len(recording.shape_of[x]) != ndim + 2:
        return None
    return _moved(x, {1: 1})


def resized(call: Call, recording: Recording) -> Meaning | None:
    """``F.interpolate(x, ...)``: each pixel is a mean of some, with weights that sum to 1."""
    return _moved(call.input, {1: 1}) if is_data(call.input, recording) and recording.is_fixed(call.input, 1) else None


def _without(x: fx.Node, gone: set[int | None], rank: int, *, keeps: bool = False) -> Rearranged | None:
    """Axes that are reduced, and gone unless one ``keeps`` them."""
    kept = [axis for axis in range(rank) if keeps or axis not in gone]
    stay = (axis for axis in kept if is_channel_axis(axis, rank) and axis not in gone)
    return None if None in gone else _moved(x, {axis: kept.index(axis) for axis in stay})


def _moved(x: fx.Node, moves: dict[int, int]) -> Rearranged | None:
    found = tuple((axis, place) for axis, place in moves.items() if place > 0)
    return Rearranged(x, found) if found else None


_MEASURING = frozenset({"view_as", "reshape_as", "expand_as", "type_as"})


def only_measures(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` takes no more of ``node`` than its shape or its dtype: ``x.reshape_as(node)``."""
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    return name.partition(".")[0] in _MEASURING and user.args[0] is not node
