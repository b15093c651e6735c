"""Fake quantisation: rounding that training puts beside layers, so that a later quantised model behaves alike.

A value rounded that way is no affine map of its input, and a weight rounded that way is chosen for its own layer: in a
merged kernel the rounding would have to be found again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from repfuse.ops.call import Call
from repfuse.ops.meaning import Meaning, Unfusible
from repfuse.ops.spelling import spelled

if TYPE_CHECKING:
    from repfuse.recording.recording import Recording


def fake_quantise(_call: Call, _recording: Recording) -> Meaning:
    """Round to a grid, in floating point."""
    return Unfusible("fake-quantised", "the value is rounded as a quantised one would be")


def is_fake_quantised(value: Any) -> bool:
    """Whether a weight went through fake quantisation on its way from the parameters."""
    pending: list[Any] = [value]
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        call = spelled(node)
        if call is not None and call.operator.startswith("fake_quantize"):
            return True
        pending += node.all_input_nodes
    return False
