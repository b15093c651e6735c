"""Whether the last axis of a tensor holds the channels, as linear layers have them: for slices, which do not say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from repfuse.ops.call import Call, is_data
from repfuse.ops.reading import call_of

if TYPE_CHECKING:
    from repfuse.ops.scope import Scope

_LINEAR = frozenset({"linear", "matmul"})
_ALONG = frozenset(
    {"add", "sub", "rsub", "mul", "div", "neg", "cat", "getitem", "chunk", "split", "tensor_split", "narrow", "dropout"}
)
"""Operators that leave the channels on the axis where they are."""


def channels_last(reader: fx.Node, x: fx.Node, scope: Scope) -> bool:
    """Whether ``x`` comes from a linear layer, or what ``reader`` makes of it goes into one.

    A choice between two readings of a slice, each of them exact: a crop, or a choice of channels.
    """
    return any(_is_linear(call_of(user, scope)) for user in reader.users) or _from_linear(x, scope)


def _from_linear(x: fx.Node, scope: Scope) -> bool:
    node: fx.Node | None = x
    while node is not None:
        call = call_of(node, scope)
        if _is_linear(call):
            return True
        along = isinstance(call, Call) and call.operator in _ALONG
        before = [
            argument for argument in node.all_input_nodes if is_data(argument, scope) or _is_list(argument, scope)
        ]
        node = before[0] if along and before else None
    return False


def _is_linear(call: object) -> bool:
    return isinstance(call, Call) and call.operator in _LINEAR


def _is_list(node: fx.Node, scope: Scope) -> bool:
    call = call_of(node, scope)
    return isinstance(call, Call) and call.operator in ("chunk", "split", "tensor_split")
