"""A border filled by assignment: ``y = F.pad(x, ...)``, then ``y[:, :, 0:1, :] = value`` on every padded side.

Together they are one pad with ``value``, a number or one number per channel. Blocks write it so because ``F.pad`` takes
numbers only (Ding et al., "Diverse Branch Block", arXiv 2103.13425: the bias of a 1x1 layer around its output).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import fx

from repfuse.algebra.expression import Through
from repfuse.algebra.geometry import Padding
from repfuse.algebra.layers import Filter
from repfuse.ops.call import Call, constant, number
from repfuse.ops.filters import is_pad, pad
from repfuse.ops.indexing import entries_of, is_whole
from repfuse.ops.meaning import Meaning, Passage
from repfuse.ops.spelling import spelled
from repfuse.ops.sums import Channels, channels_of

if TYPE_CHECKING:
    from repfuse.recording.recording import Recording

Side = tuple[int, bool]
"""A spatial axis, and whether it is its end."""


def assigned(call: Call, recording: Recording) -> Meaning | None:
    """Return the pad that the last assignment completes; a passage for those before it."""
    return _border(call.node, recording) or _passage(call.node, call.input, recording)


def filled_pad(call: Call, recording: Recording) -> Meaning | None:
    """Return what a pad means: a passage where assignments fill all of it, else by itself."""
    return _passage(call.node, call.input, recording) or pad(call, recording)


def _passage(node: fx.Node, x: Any, recording: Recording) -> Passage | None:
    last = node
    while (after := _next_assignment(last)) is not None:
        last = after
    return Passage((x,)) if last is not node and _border(last, recording) is not None else None


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
    meaning = pad(base, recording) if isinstance(base, Call) and base.operator in ("pad", "constant_pad_nd") else None
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
    channels = channels_of(tensor.shape, shape)
    several = isinstance(channels, Channels) and channels.axis == 1
    single = isinstance(channels, Channels) and channels.axis is None and shape[1] == 1
    return tensor.name if several or single else None
