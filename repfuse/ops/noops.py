"""Operators that return their input in inference. Whether a cast changes the dtype, the shapes tell the planner."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repfuse.ops.call import Call, is_data
from repfuse.ops.meaning import Meaning, Same

if TYPE_CHECKING:
    from repfuse.recording.recording import Recording


def same(call: Call, recording: Recording) -> Meaning | None:
    """``y = x``."""
    return Same(call.input) if is_data(call.input, recording) else None


def dropout(call: Call, recording: Recording) -> Meaning | None:
    """``y = x`` unless it drops."""
    return same(call, recording) if call.get("training", True) is False else None


def cast(call: Call, recording: Recording) -> Meaning | None:
    """``x.type(dtype)``; without an argument, it is a string."""
    return None if call.get("dtype") is None else same(call, recording)


def attribute(call: Call, recording: Recording) -> Meaning | None:
    """``x.data``."""
    return same(call, recording) if call.get("attribute") == "data" else None
