"""What a graph node means: one table per spelling, each row from a node to one of the few kinds in ``meaning``."""

from __future__ import annotations

from torch import fx, nn

from repfuse.ops.functions import function_meaning
from repfuse.ops.meaning import Meaning
from repfuse.ops.memory import shared_by, written_by
from repfuse.ops.modules import module_meaning

__all__ = ["Meaning", "meaning_of", "shared_by", "written_by"]


def meaning_of(node: fx.Node, root: nn.Module) -> Meaning | None:
    """Return what ``node`` of a graph of ``root`` means to the planner, or None where it is opaque."""
    if node.op == "call_module":
        return module_meaning(node, root.get_submodule(str(node.target)))
    if node.op in ("call_function", "call_method"):
        return function_meaning(node, lambda name: _attribute(root, name))
    return None


def _attribute(root: nn.Module, name: str) -> object:
    path, _, leaf = name.rpartition(".")
    return getattr(root.get_submodule(path), leaf)
