"""Which nodes may write into the memory of others, and which may return it: by their spelling, and on the safe side."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg


def written_by(node: fx.Node, root: nn.Module, opaque: Container[str]) -> tuple[fx.Node, ...]:
    """Return the nodes whose memory ``node`` may overwrite. ``opaque`` are the modules that were not traced through."""
    if _is_foreign(node, opaque):
        return tuple(node.all_input_nodes)
    out = _nodes(node.kwargs.get("out"))
    return (*out, *_first(node)) if _in_place(node, root) else out


def shared_by(node: fx.Node, root: nn.Module, opaque: Container[str]) -> tuple[fx.Node, ...]:
    """Return the nodes whose memory the result of ``node`` may lie in."""
    if _may_view(node, root):
        return (*_first(node), *written_by(node, root, opaque))
    return written_by(node, root, opaque)


def _is_foreign(node: fx.Node, opaque: Container[str]) -> bool:
    """Whether nothing is known of what ``node`` runs."""
    if node.op == "call_module":
        return str(node.target) in opaque
    package = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    return node.op == "call_function" and package not in ("torch", "_operator", "builtins", "math")


def _in_place(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return getattr(root.get_submodule(str(node.target)), "inplace", False) is True
    if node.op not in ("call_method", "call_function"):
        return False
    name = _name(node)
    is_operator = getattr(node.target, "__module__", "") == "_operator" and name in _IN_PLACE_OPERATORS
    by_name = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    return is_operator or by_name or node.kwargs.get("inplace") is True


def _may_view(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), nn.Flatten | nn.Unflatten)
    return node.op in ("call_method", "call_function") and _name(node) in _VIEWS


def _name(node: fx.Node) -> str:
    """Return the name of a method or function, ``add_`` for ``torch.ops.aten.add_.Tensor``."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return str(name).partition(".")[0]


def _first(node: fx.Node) -> tuple[fx.Node, ...]:
    return _nodes(node.args[0] if node.args else node.kwargs.get("input"))


def _nodes(argument: Any) -> tuple[fx.Node, ...]:
    found: list[fx.Node] = []
    map_arg(argument, found.append)
    return tuple(found)


_IN_PLACE_OPERATORS = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul", "setitem"}
)

# ``getattr`` stands for ``x.data``, ``x.T`` and the like; a cast to the same dtype returns the tensor itself.
_VIEWS = frozenset(
    {
        "adjoint",
        "alias",
        "as_strided",
        "bfloat16",
        "broadcast_to",
        "chunk",
        "contiguous",
        "cpu",
        "cuda",
        "detach",
        "diagonal",
        "double",
        "dsplit",
        "expand",
        "expand_as",
        "flatten",
        "float",
        "getattr",
        "getitem",
        "half",
        "hsplit",
        "imag",
        "moveaxis",
        "movedim",
        "narrow",
        "permute",
        "positive",
        "ravel",
        "real",
        "reshape",
        "reshape_as",
        "select",
        "split",
        "split_with_sizes",
        "squeeze",
        "swapaxes",
        "swapdims",
        "t",
        "tensor_split",
        "to",
        "transpose",
        "type",
        "type_as",
        "unbind",
        "unflatten",
        "unfold",
        "unsqueeze",
        "view",
        "view_as",
        "view_as_real",
        "vsplit",
    }
)
