"""Operators that return their input in inference. Whether a cast changes the dtype, the shapes tell the planner."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repfuse.ops.call import Call, is_data
from repfuse.ops.meaning import Meaning, Same

if TYPE_CHECKING:
    from repfuse.ops.scope import Scope


def same(call: Call, scope: Scope) -> Meaning | None:
    """``y = x``."""
    return Same(call.input) if is_data(call.input, scope) else None


def dropout(call: Call, scope: Scope) -> Meaning | None:
    """``y = x`` unless it drops."""
    return same(call, scope) if call.get("training", True) is False else None


def cast(call: Call, scope: Scope) -> Meaning | None:
    """``x.type(dtype)``; without an argument, it is a string."""
    return None if call.get("dtype") is None else same(call, scope)


def attribute(call: Call, scope: Scope) -> Meaning | None:
    """``x.data``."""
    return same(call, scope) if call.get("attribute") == "data" else None
