"""Which nodes may write into the memory of others, and which may return it: by their spelling, and on the safe side."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import fx, nn
from torch._ops import OpOverload
from torch.fx.node import map_arg

from repfuse.tracing.assignment import assigned


def written_by(node: fx.Node, part: nn.Module | None, opaque: Container[str]) -> tuple[fx.Node, ...]:
    """Return the nodes whose memory ``node`` may overwrite.

    ``part`` is the module that it calls, if it calls one; ``opaque`` are those that were not traced through.
    """
    if is_foreign(node, opaque):
        return tuple(node.all_input_nodes)
    out = (*_nodes(node.kwargs.get("out")), *_annotated(node, written=True), *_statistics(node))
    return (*out, *_first(node)) if _in_place(node, part) else out


def viewed_by(node: fx.Node, part: nn.Module | None) -> tuple[fx.Node, ...]:
    """Return the nodes whose memory the result of ``node`` may lie in without being written."""
    shared = _annotated(node, written=False)
    if node.op == "call_function" and called(node) in _VIEWS_OF_ANY:
        return tuple(node.all_input_nodes)
    return (*_first(node), *shared) if _may_view(node, part) else shared


def is_foreign(node: fx.Node, opaque: Container[str]) -> bool:
    """Whether nothing is known of what ``node`` runs."""
    if node.op == "call_module":
        return str(node.target) in opaque
    module = getattr(node.target, "__module__", None) or "torch"
    known = module.partition(".")[0] in ("torch", "_operator", "builtins", "math") or module == _STOCHASTIC_DEPTH
    return node.op == "call_function" and not known and node.target is not assigned


def _in_place(node: fx.Node, part: nn.Module | None) -> bool:
    if part is not None:
        return getattr(part, "inplace", False) is True
    if node.op not in ("call_method", "call_function"):
        return False
    name = called(node)
    is_operator = getattr(node.target, "__module__", "") == "_operator" and name in _IN_PLACE_OPERATORS
    by_name = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    return is_operator or by_name or node.kwargs.get("inplace") is True or node.target is assigned


def _may_view(node: fx.Node, part: nn.Module | None) -> bool:
    if part is not None:
        return isinstance(part, nn.Flatten | nn.Unflatten)
    return node.op in ("call_method", "call_function") and called(node) in _VIEWS


def _annotated(node: fx.Node, *, written: bool) -> tuple[fx.Node, ...]:
    """Return the arguments of an ATen operator that its schema says it writes, or that its result may lie in."""
    if not isinstance(node.target, OpOverload):
        return ()
    arguments = node.target._schema.arguments
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False)) | node.kwargs
    marks = [(argument.name, argument.alias_info) for argument in arguments if argument.alias_info is not None]
    return _nodes([given.get(name) for name, mark in marks if mark.is_write or not written])


def _statistics(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return what a normalisation in training mode writes: its statistics."""
    if node.op != "call_function" or not called(node).endswith(("batch_norm", "instance_norm")):
        return ()
    by_name = node.kwargs.get("training", node.kwargs.get("use_input_stats", "instance" in called(node)))
    training = node.args[5] if len(node.args) > 5 else by_name
    first = 1 if getattr(node.target, "__module__", "") == "torch.nn.functional" else 3
    given = (*node.args[first : first + 2], node.kwargs.get("running_mean"), node.kwargs.get("running_var"))
    return () if training is False else _nodes(given)


def called(node: fx.Node) -> str:
    """Return the name of a method or function, ``add_`` for ``torch.ops.aten.add_.Tensor``."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return str(name).partition(".")[0]


def _first(node: fx.Node) -> tuple[fx.Node, ...]:
    return _nodes(node.args[0] if node.args else node.kwargs.get("input"))


def _nodes(argument: Any) -> tuple[fx.Node, ...]:
    found: list[fx.Node] = []
    map_arg(argument, found.append)
    return tuple(found)


_STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth"

_IN_PLACE_OPERATORS = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul", "setitem"}
)

_VIEWS_OF_ANY = frozenset({"broadcast_tensors", "einsum", "meshgrid"})

# ``getattr`` stands for ``x.data``, ``x.T`` and the like; a cast to the same dtype returns the tensor itself.
_VIEWS = frozenset(
    {
        "adjoint",
        "alias",
        "as_strided",
        "atleast_1d",
        "atleast_2d",
        "atleast_3d",
        "bfloat16",
        "broadcast_to",
        "chunk",
        "conj",
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
        "int",
        "long",
        "moveaxis",
        "movedim",
        "narrow",
        "permute",
        "positive",
        "ravel",
        "real",
        "reshape",
        "reshape_as",
        "resolve_conj",
        "resolve_neg",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "stochastic_depth",
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
        "unsafe_chunk",
        "unsafe_split",
        "unsqueeze",
        "view",
        "view_as",
        "view_as_complex",
        "view_as_real",
        "vsplit",
    }
)
