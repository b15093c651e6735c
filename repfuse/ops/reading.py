"""A graph node as the call of an operator, whether it calls a module, a function or a method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from repfuse.ops.call import Call
from repfuse.ops.meaning import Unfusible
from repfuse.ops.modules import module_call
from repfuse.ops.spelling import spelled

if TYPE_CHECKING:
    from repfuse.ops.scope import Scope


def call_of(node: fx.Node, scope: Scope) -> Call | Unfusible | None:
    """Return what the node calls; why it only looks like it; or None where it is nothing that repfuse knows."""
    return module_call(node, scope) if node.op == "call_module" else spelled(node)
