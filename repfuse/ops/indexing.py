"""Slices and lists as an index: a choice of channels, or a crop; assigned to, the border of a pad.

``x[:, :, a:-b:s]`` keeps ``ceil((n - a - b) / s)`` positions from a on, as a 1x1 kernel of stride s does whose padding
is (-a, -b). Any other end or start counts from the side that the input size decides, so it is no such map.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from repfuse.algebra.expression import Selected, Through
from repfuse.algebra.geometry import Padding
from repfuse.algebra.layers import Filter
from repfuse.ops.convolution import filtered, is_pad, pad
from repfuse.ops.meaning import Meaning, Passage, Same, Unfusible
from repfuse.ops.spelling import Call, axis_of, constant, is_channel_axis, is_data, is_integer, number, spelled
from repfuse.ops.sums import axis_of_constant
from repfuse.recording.recording import Recording

# Whether the last axis of a tensor holds the channels, as linear layers have them: for slices, which do not say.


_LINEAR = frozenset({"linear", "matmul"})
_ALONG = frozenset(
    {"add", "sub", "rsub", "mul", "div", "neg", "cat", "getitem", "chunk", "split", "tensor_split", "narrow", "dropout"}
)
"""Operators that leave the channels on the axis where they are."""


def channels_last(reader: fx.Node, x: fx.Node, recording: Recording) -> bool:
    """Whether ``x`` comes from a linear layer, or what ``reader`` makes of it goes into one: the last axis is fixed.

    For a slice a choice between two readings, each of them exact: a crop, or a choice of channels.
    """
    return any(_is_linear(spelled(user)) for user in reader.users) or _from_linear(x, recording)


def _from_linear(x: fx.Node, recording: Recording) -> bool:
    node: fx.Node | None = x
    while node is not None:
        call = spelled(node)
        if _is_linear(call):
            return True
        along = isinstance(call, Call) and call.operator in _ALONG
        before = [
            argument for argument in node.all_input_nodes if is_data(argument, recording) or _is_list_of_axes(argument)
        ]
        node = before[0] if along and before else None
    return False


def _is_linear(call: object) -> bool:
    return isinstance(call, Call) and call.operator in _LINEAR


def _is_list_of_axes(node: fx.Node) -> bool:
    call = spelled(node)
    return isinstance(call, Call) and call.operator in ("chunk", "split", "tensor_split")


Entry = slice | list[int]
_ALL = slice(None)


def indexed(call: Call, recording: Recording) -> Meaning | None:
    """``x[index]``; a list in it may be a tensor of numbers that no input changes."""
    x, index = call.input, call.get("index")
    if not is_data(x, recording):
        return None
    if call.operator == "index":  # ATen's, which says None for a whole axis
        index = tuple(_ALL if entry is None else entry for entry in call.get("indices"))
    written = [_written(entry, recording) for entry in (index if isinstance(index, tuple) else (index,))]
    entries = entries_of(tuple(written), len(recording.shape_of[x]))
    return None if entries is None else _chosen(call.node, x, entries, recording)


def _written(index: Any, recording: Recording) -> Any:
    """Return the list of numbers that a tensor holds, where no input changes it; anything else as it is."""
    name = recording.constants.name_of(index)
    if name is None or recording.dtype_of.get(index) not in (torch.int64, torch.int32):
        return index
    return recording.constants.numbers(name)


def along(call: Call, recording: Recording) -> Meaning | None:
    """Some places along one axis: those of ``index_select``, a slice, a narrowing; each place several times."""
    x = call.input
    shape = recording.shape_of[x]
    axis = axis_of(call.get("dim", 0 if call.operator == "slice" else None), len(shape))
    if axis is None:
        return None
    entry: Any = None
    match call.operator:
        case "index_select":
            entry = _written(call.get("index"), recording)
        case "repeat_interleave" if is_integer(times := call.get("repeats")) and is_channel_axis(axis, len(shape)):
            entry = [channel for channel in range(shape[axis]) for _ in range(times)]
        case "slice":
            entry = slice(*(call.get(name) for name in ("start", "end", "step")))
        case "narrow" if is_integer(start := call.get("start")) and is_integer(length := call.get("length")):
            end = start + length
            entry = slice(start, None if start < 0 and end == 0 else end)
    entries: list[Entry] = [_ALL] * len(shape)
    entries[axis] = entry
    return _chosen(call.node, x, entries, recording) if _is_slice(entry) or _is_list(entry) else None


def entries_of(index: Any, rank: int) -> list[Entry] | None:
    """Return a slice or a list of numbers for each axis; None for an index with anything else in it."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if sum(entry is Ellipsis for entry in entries) == 1:
        place = next(place for place, entry in enumerate(entries) if entry is Ellipsis)
        entries[place : place + 1] = [_ALL] * (rank - len(entries) + 1)
    usable = all(_is_slice(entry) or _is_list(entry) for entry in entries)
    return entries + [_ALL] * (rank - len(entries)) if usable and len(entries) <= rank else None


def is_whole(entry: Entry) -> bool:
    """Whether the entry keeps the whole axis as it is."""
    return isinstance(entry, slice) and _bounds(entry) == (0, None, 1)


def _chosen(node: fx.Node, x: fx.Node, entries: list[Entry], recording: Recording) -> Meaning | None:
    rank = len(entries)
    axes = [axis for axis, entry in enumerate(entries) if not is_whole(entry)]
    if not axes:
        return Same(x)
    if axes == [1] or (axes == [rank - 1] and rank > 2 and channels_last(node, x, recording)):
        return _selected(x, axes[0], entries[axes[0]], recording)
    return _cropped(x, entries[2:], recording) if min(axes) >= 2 and rank <= 5 else None


def _selected(x: fx.Node, axis: int, entry: Entry, recording: Recording) -> Meaning | None:
    if not recording.is_fixed(x, axis):
        return Unfusible("changes-with-size", "what the slice takes depends on the size of the input")
    channels = range(recording.shape_of[x][axis])
    indices = tuple(channels[entry] if isinstance(entry, slice) else (channels[place] for place in entry))
    if not indices:
        return None
    return Same(x) if indices == tuple(channels) else Selected(x, indices, axis)


def _cropped(x: fx.Node, entries: list[Entry], recording: Recording) -> Meaning | None:
    if not all(isinstance(entry, slice) for entry in entries):
        return None
    bounds = [_bounds(entry) for entry in entries if isinstance(entry, slice)]
    if any(start < 0 or (stop is not None and stop >= 0) for start, stop, _ in bounds):
        return Unfusible("size-dependent-slice", "what the slice cuts off depends on the size of the input")
    padding = tuple((-start, stop or 0) for start, stop, _ in bounds)
    return filtered(x, padding, recording, stride=tuple(step for _, _, step in bounds))


def _bounds(entry: slice) -> tuple[int, int | None, int]:
    """Return start, stop and step; ATen writes an end that is left out as the largest integer."""
    stop = None if entry.stop is None or entry.stop >= sys.maxsize else entry.stop
    return entry.start or 0, stop, 1 if entry.step is None else entry.step


def _is_slice(entry: Any) -> bool:
    bounds = (entry.start, entry.stop, entry.step) if isinstance(entry, slice) else (True,)
    return all(bound is None or is_integer(bound) for bound in bounds)


def _is_list(entry: Any) -> bool:
    return isinstance(entry, list) and all(map(is_integer, entry))


# A border filled by assignment: ``y = F.pad(x, ...)``, then ``y[:, :, 0:1, :] = value`` on every padded side.
#
# Together they are one pad with ``value``, a number or one number per channel. Blocks write it so because ``F.pad``
# takes numbers only (Ding et al., "Diverse Branch Block", arXiv 2103.13425: the bias of a 1x1 layer around its output).


Side = tuple[int, bool]
"""A spatial axis, and whether it is its end."""


def assigned(call: Call, recording: Recording) -> Meaning | None:
    """Return the pad that the last assignment completes; a passage for those before it."""
    return _border(call.node, recording) or _passage(call.node, recording)


def filled_pad(call: Call, recording: Recording) -> Meaning | None:
    """Return what a pad means: a passage where assignments fill all of it, else by itself."""
    return _passage(call.node, recording) or pad(call, recording)


def _passage(node: fx.Node, recording: Recording) -> Passage | None:
    last = node
    while (after := _next_assignment(last)) is not None:
        last = after
    return Passage() if last is not node and _border(last, recording) is not None else None


def _next_assignment(node: fx.Node) -> fx.Node | None:
    """Return the assignment into ``node``, where nothing else reads it."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    call = None if reader is None else spelled(reader)
    return reader if call is not None and call.operator == "assigned" and call.input is node else None


def _border(last: fx.Node, recording: Recording) -> Through[fx.Node] | None:
    """Return the pad whose border the assignments up to ``last`` fill."""
    assignments: list[Call] = []
    node, call = last, spelled(last)
    while call is not None and call.operator == "assigned" and isinstance(call.input, fx.Node):
        assignments.append(call)
        node, reader = call.input, node
        if _next_assignment(node) is not reader:
            return None
        call = spelled(node)
    base = spelled(node)
    padded = base is not None and base.operator in ("pad", "constant_pad_nd") and is_data(base.input, recording)
    meaning = pad(base, recording) if base is not None and padded else None
    if not assignments or not isinstance(meaning, Through) or not isinstance(meaning.layer, Filter):
        return None
    padding = meaning.layer.geometry.padding
    sides = {_side(call, padding) for call in assignments}
    wanted = {(axis, end) for axis, pair in enumerate(padding) for end in (False, True) if pair[end]}
    fill = _fill(assignments, recording.shape_of[meaning.input], recording)
    if not is_pad(meaning.layer) or sides != wanted or fill is None:
        return None
    return Through(meaning.input, replace(meaning.layer, fill=fill))


def _side(call: Call, padding: Padding) -> Side | None:
    """Return the side whose padding the assignment covers exactly; None if it covers anything else."""
    entries = entries_of(call.get("index"), len(padding) + 2)
    cut = [axis for axis, entry in enumerate(entries or ()) if not is_whole(entry)]
    if entries is None or len(cut) != 1 or cut[0] < 2 or not isinstance(entries[cut[0]], slice):
        return None
    axis, entry = cut[0] - 2, entries[cut[0]]
    assert isinstance(entry, slice)
    before, after = padding[axis]
    bounds = (entry.start or 0, entry.stop, entry.step or 1)
    if bounds == (0, before, 1):
        return axis, False
    return (axis, True) if bounds == (-after, None, 1) else None


def _fill(assignments: list[Call], shape: tuple[int, ...], recording: Recording) -> float | str | None:
    """Return the one value that all of them assign."""
    values = {_value(call.get("value"), shape, recording) for call in assignments}
    return values.pop() if len(values) == 1 else None


def _value(value: Any, shape: tuple[int, ...], recording: Recording) -> float | str | None:
    if (plain := number(value)) is not None:
        return plain
    tensor = constant(value, recording)
    if tensor is None:
        return None
    axis = axis_of_constant(tensor.shape, shape)
    return tensor.name if axis == 1 or (axis is None and shape[1] == 1) else None
