"""Parts, concatenations and shuffles of channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from repfuse.algebra.expression import Joined, Selected
from repfuse.ops.call import Call, axis_of, contains_node, is_channel_axis, is_data
from repfuse.ops.indexing import is_integer
from repfuse.ops.meaning import Meaning, Passage, Same
from repfuse.ops.spelling import spelled

if TYPE_CHECKING:
    from repfuse.recording.recording import Recording


# Concatenations and splits along the channels.


PIECES = frozenset({"chunk", "split", "tensor_split"})
"""Operators that return a list of parts of a tensor."""


def cat(call: Call, recording: Recording) -> Meaning | None:
    """The channels of several tensors, one after the other."""
    tensors = call.get("tensors")
    if not isinstance(tensors, list | tuple) or not tensors or not all(is_data(part, recording) for part in tensors):
        return None
    ranks = {len(recording.shape_of[part]) for part in tensors}
    rank = min(ranks)
    axis = axis_of(call.get("dim", 0), rank)
    if len(ranks) > 1 or not is_channel_axis(axis, rank):
        return None
    if not all(recording.is_fixed(part, axis) for part in tensors):
        return None
    return Same(tensors[0]) if len(tensors) == 1 else Joined(tuple(tensors), axis)


def pieces(call: Call, recording: Recording) -> Meaning | None:
    """A list of parts whose readers take one part each; ``piece`` is such a reader."""
    users = [spelled(user) for user in call.node.users]
    taken = all(user is not None and user.operator == "getitem" and is_integer(user.get("index")) for user in users)
    return Passage((call.input,)) if users and taken and _parts(call, recording) is not None else None


def piece(call: Call, producer: Call, recording: Recording) -> Meaning | None:
    """One part of a list of parts: a range of channels."""
    found, place = _parts(producer, recording), call.get("index")
    if found is None or not is_integer(place):
        return None
    axis, parts = found
    if not -len(parts) <= place < len(parts) or not parts[place]:
        return None
    return Selected(producer.input, tuple(parts[place]), axis)


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


# Channel shuffle: one operator, or a view, a transpose and a view.
#
# ``x.view(N, g, c, H, W).transpose(1, 2).reshape(N, C, H, W)`` puts channel ``i * c + j`` at ``j * g + i``. The sizes
# in the views must be those of x for every input: g and c numbers (the channels do not change), the others read from x,
# or one of them -1, which can then be nothing else.
#
# Source: Zhang et al., "ShuffleNet", arXiv 1707.01083, section 3.1.


def shuffle(call: Call, recording: Recording) -> Meaning | None:
    """``channel_shuffle(x, groups)``."""
    x, groups = call.input, call.get("groups")
    return _shuffled(x, groups, recording) if is_data(x, recording) and is_integer(groups) else None


def reshaped(call: Call, recording: Recording) -> Meaning | None:
    """Return what a view means: the last of a channel shuffle, or one of the steps before it."""
    steps = _steps(call, recording)
    if steps is not None:
        return _shuffled(steps.x, steps.groups, recording)
    return passing(call, recording)


def passing(call: Call, recording: Recording) -> Passage | None:
    """Return the passage of a step before the last of a channel shuffle, which nothing else reads."""
    node = call.node
    for _ in range(3):
        if len(node.users) != 1:
            return None
        node = next(iter(node.users))
        last = spelled(node)
        steps = None if last is None else _steps(last, recording)
        if steps is not None and call.node in steps.nodes:
            return Passage((call.input,))
    return None


@dataclass(frozen=True)
class _Steps:
    """The steps ``nodes`` before the last of a shuffle of ``x``."""

    x: fx.Node
    groups: int
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _SizeOf:
    """The size of x along an axis, whatever it is."""

    axis: int


def _shuffled(x: fx.Node, groups: int, recording: Recording) -> Selected[fx.Node] | None:
    channels = recording.shape_of[x][1] if len(recording.shape_of[x]) > 2 else 0
    if groups < 1 or channels % groups or not channels or not recording.is_fixed(x, 1):
        return None
    each = channels // groups
    return Selected(x, tuple(i * each + j for j in range(each) for i in range(groups)), 1)


def _steps(last: Call, recording: Recording) -> _Steps | None:
    """Return the shuffle whose last step is ``last``, if it is one."""
    turned = _before(last, ("view", "flatten"))
    copied = turned if turned is not None and turned.operator in ("contiguous", "clone") else None
    turned = turned if copied is None else _before(copied, ("contiguous", "clone"))
    view = None if turned is None else _before(turned, ("transpose", "permute"))
    if turned is None or view is None or view.operator != "view" or not is_data(view.input, recording):
        return None
    x, rank = view.input, len(recording.shape_of[view.input])
    groups = _groups(view, recording)
    if groups is None or not _turns(turned, rank + 1) or not _joins(last, x, recording):
        return None
    return _Steps(x, groups, tuple(call.node for call in (view, turned, copied) if call is not None))


def _before(call: Call, operators: Sequence[str]) -> Call | None:
    usable = call.operator in operators and isinstance(call.input, fx.Node)
    return spelled(call.input) if usable else None


def _groups(view: Call, recording: Recording) -> int | None:
    """Return g of ``view(N, g, c, *axes)``."""
    x = view.input
    shape, sizes = recording.shape_of[x], _sizes(view, recording)
    if len(sizes) != len(shape) + 1 or len(shape) < 3:
        return None
    groups, each = sizes[1], sizes[2]
    if groups == -1 and isinstance(each, int) and each > 0:
        groups = shape[1] // each
    elif each == -1 and isinstance(groups, int) and groups > 0:
        each = shape[1] // groups
    if not isinstance(groups, int) or not isinstance(each, int) or groups * each != shape[1] or groups < 1:
        return None
    others = [sizes[0], *sizes[3:]]
    return groups if _fit([*others], _axes(shape), x, recording) else None


def _turns(call: Call, rank: int) -> bool:
    """Whether the call swaps axes 1 and 2 of ``rank``."""
    if call.operator == "transpose":
        return {axis_of(call.get("dim0"), rank), axis_of(call.get("dim1"), rank)} == {1, 2}
    dims = call.get("dims", ())
    return [axis_of(dim, rank) for dim in dims] == [0, 2, 1, *range(3, rank)]


def _joins(last: Call, x: fx.Node, recording: Recording) -> bool:
    """Whether ``last`` joins axes 1 and 2 and keeps the others."""
    shape = recording.shape_of[x]
    if last.operator == "flatten":
        bounds = (call_dim(last, "start_dim", 0, len(shape) + 1), call_dim(last, "end_dim", -1, len(shape) + 1))
        return bounds == (1, 2)
    sizes = _sizes(last, recording, x)
    if len(sizes) != len(shape):
        return False
    axes = _axes(shape)
    return _fit(sizes, [axes[0], shape[1], *axes[1:]], x, recording)


def call_dim(call: Call, name: str, default: int, rank: int) -> int | None:
    """Return the axis that an argument names."""
    return axis_of(call.get(name, default), rank)


def _axes(shape: Sequence[int]) -> list[int | _SizeOf]:
    return [_SizeOf(axis) for axis in range(len(shape)) if axis != 1]


def _fit(sizes: Sequence[Any], expected: Sequence[int | _SizeOf], x: fx.Node, recording: Recording) -> bool:
    """Whether the sizes are the expected ones; one -1 is what the others leave."""
    right = all(_is(size, wanted, x, recording) for size, wanted in zip(sizes, expected, strict=True))
    return right and sizes.count(-1) <= 1


def _is(size: Any, wanted: int | _SizeOf, x: fx.Node, recording: Recording) -> bool:
    if size in (-1, wanted):
        return True
    return (
        isinstance(wanted, _SizeOf)
        and recording.is_fixed(x, wanted.axis)
        and size == recording.shape_of[x][wanted.axis]
    )


def _sizes(view: Call, recording: Recording, x: fx.Node | None = None) -> list[int | _SizeOf | None]:
    sizes = view.get("size", ())
    of = view.input if x is None else x
    return [_size(size, of, recording) for size in (sizes if isinstance(sizes, list | tuple) else (sizes,))]


def _size(value: Any, x: fx.Node, recording: Recording) -> int | _SizeOf | None:
    """Return a size as a number, if it is one for every input, or as a size of x."""
    if is_integer(value):
        return int(value)
    call = spelled(value) if isinstance(value, fx.Node) else None
    if call is None:
        return None
    if call.operator in ("floordiv", "mul"):
        one, other = (_size(call.get(name), x, recording) for name in ("input", "other"))
        if not isinstance(one, int) or not isinstance(other, int) or other == 0:
            return None
        return one // other if call.operator == "floordiv" else one * other
    axis = _read_axis(call, x, len(recording.shape_of[x]))
    return recording.shape_of[x][1] if axis == 1 else None if axis is None else _SizeOf(axis)


def _read_axis(call: Call, x: fx.Node, rank: int) -> int | None:
    """Return the axis whose size is read: ``x.size(0)``, ``x.size()[0]``, ``x.shape[0]``."""
    if call.operator == "size" and call.input is x:
        return axis_of(call.get("dim"), rank)
    whole = spelled(call.input) if call.operator == "getitem" and isinstance(call.input, fx.Node) else None
    if whole is None or whole.input is not x:
        return None
    is_shape = whole.operator == "getattr" and whole.get("attribute") == "shape"
    return axis_of(call.get("index"), rank) if is_shape or whole.operator == "size" else None
