"""What a graph node means: its spelling is translated into one operator, whose row gives one of a few kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from repfuse.ops.meaning import Meaning
from repfuse.ops.spelling import spelled
from repfuse.ops.table import ROWS

if TYPE_CHECKING:
    from repfuse.recording.recording import Recording

__all__ = ["Meaning", "meaning_of"]


def meaning_of(node: fx.Node, recording: Recording) -> Meaning | None:
    """Return what ``node`` means to the planner, or None where it is opaque, or depends on parameters alone."""
    call = spelled(node)
    if call is None or recording.constants.name_of(node) is not None:
        return None
    row = ROWS.get(call.operator)
    return None if row is None else row(call, recording)
