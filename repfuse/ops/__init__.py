"""What a graph node means: its spelling is translated into one operator, whose row gives one of a few kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from repfuse.ops.meaning import Meaning, Unfusible
from repfuse.ops.reading import call_of
from repfuse.ops.table import ROWS

if TYPE_CHECKING:
    from repfuse.ops.scope import Scope

__all__ = ["Meaning", "meaning_of"]


def meaning_of(node: fx.Node, scope: Scope) -> Meaning | None:
    """Return what ``node`` means to the planner, or None where it is opaque, or depends on parameters alone."""
    if node.op not in ("call_module", "call_function", "call_method") or scope.constants.name_of(node) is not None:
        return None
    call = call_of(node, scope)
    if call is None or isinstance(call, Unfusible):
        return call
    row = ROWS.get(call.operator)
    return None if row is None else row(call, scope)
