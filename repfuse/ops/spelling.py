"""A graph node as a call of an operator, whichever way it is spelled.

Functions of torch and torch.nn.functional, operators, tensor methods and ATen overloads are translated into one
signature per operator, with the argument names of torch.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._ops import OpOverload

from repfuse.ops.call import Call
from repfuse.ops.signatures import ALIASES, FOREIGN, FUNCTIONS, IN_PLACE, OWN_SIGNATURES, RENAMED, SIGNATURES


def spelled(node: fx.Node) -> Call | None:
    """Return what a call_function or call_method node calls, or None where it is no operator that repfuse knows."""
    name = _spelled_name(node)
    if name is None:
        return None
    plain = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    kind = ALIASES.get(plain, plain)
    in_place = plain != name
    if kind not in SIGNATURES or (in_place and kind not in IN_PLACE):
        return None
    signature = OWN_SIGNATURES.get(node.target, SIGNATURES[kind]).split()
    given = _bound_by_schema(node, signature) if isinstance(node.target, OpOverload) else _bound(node, signature)
    return None if given is None else Call(node, kind, given, in_place)


def _spelled_name(node: fx.Node) -> str | None:
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return None
    if isinstance(node.target, OpOverload):
        namespace, _, name = node.target._schema.name.partition("::")
        return name if namespace == "aten" else None
    foreign = FOREIGN.get((getattr(node.target, "__module__", ""), getattr(node.target, "__name__", "")))
    return foreign or FUNCTIONS.get(node.target)


def _bound(node: fx.Node, signature: list[str]) -> dict[str, Any] | None:
    """Bind the arguments of a function or method: by position, then by name."""
    star = next((place for place, name in enumerate(signature) if name.endswith("*")), None)
    names = [name.rstrip("*") for name in signature]
    if star is None:
        values = list(node.args)
    else:
        rest = node.args[star:]
        single = len(rest) == 1 and isinstance(rest[0], list | tuple)
        values = [*node.args[:star], *([rest[0] if single else rest] if rest else [])]
    if len(values) > len(names):
        return None
    return _merged(dict(zip(names, values, strict=False)), dict(node.kwargs), names)


def _bound_by_schema(node: fx.Node, signature: list[str]) -> dict[str, Any] | None:
    """Bind the arguments of an ATen overload, with the defaults that its schema states."""
    assert isinstance(node.target, OpOverload)
    arguments = node.target._schema.arguments
    given = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    given |= dict(zip([argument.name for argument in arguments], node.args, strict=False)) | dict(node.kwargs)
    return _merged({}, given, [name.rstrip("*") for name in signature])


def _merged(first: dict[str, Any], by_name: dict[str, Any], names: list[str]) -> dict[str, Any] | None:
    """Add arguments given by name, whatever they are called there; None where the signature has no such argument."""
    for other, value in by_name.items():
        name = other if other in names else RENAMED.get(other, other)
        if name not in names or name in first:
            return None
        first[name] = value
    return first
