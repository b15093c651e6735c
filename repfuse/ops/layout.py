"""Whether the last axis of a tensor holds the channels, as linear layers have them: for slices, which do not say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from repfuse.ops.call import Call, is_data
from repfuse.ops.spelling import spelled

if TYPE_CHECKING:
    from repfuse.recording.recording import Recording

_LINEAR = frozenset({"linear", "matmul"})
_ALONG = frozenset(
    {"add", "sub", "rsub", "mul", "div", "neg", "cat", "getitem", "chunk", "split", "tensor_split", "narrow", "dropout"}
)
"""Operators that leave the channels on the axis where they are."""


def channels_last(reader: fx.Node, x: fx.Node, recording: Recording) -> bool:
    """Whether ``x`` comes from a linear layer, or what ``reader`` makes of it goes into one.

    A choice between two readings of a slice, each of them exact: a crop, or a choice of channels.
    """
    return any(_is_linear(spelled(user)) for user in reader.users) or _from_linear(x, recording)


def _from_linear(x: fx.Node, recording: Recording) -> bool:
    node: fx.Node | None = x
    while node is not None:
        call = spelled(node)
        if _is_linear(call):
            return True
        along = isinstance(call, Call) and call.operator in _ALONG
        before = [argument for argument in node.all_input_nodes if is_data(argument, recording) or _is_list(argument)]
        node = before[0] if along and before else None
    return False


def _is_linear(call: object) -> bool:
    return isinstance(call, Call) and call.operator in _LINEAR


def _is_list(node: fx.Node) -> bool:
    call = spelled(node)
    return isinstance(call, Call) and call.operator in ("chunk", "split", "tensor_split")
