"""Concatenations and splits along the channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from repfuse.ops.call import Call, axis_of, contains_node, is_channel_axis, is_data
from repfuse.ops.indexing import is_integer
from repfuse.ops.meaning import Meaning, Passage, Same, Selected, Stacked
from repfuse.ops.spelling import spelled

if TYPE_CHECKING:
    from repfuse.recording.recording import Recording

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
    return Same(tensors[0]) if len(tensors) == 1 else Stacked(tuple(tensors), axis)


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
