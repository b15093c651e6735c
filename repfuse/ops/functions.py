"""What a call of a function, an operator or a tensor method means. A row per spelling."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from repfuse.algebra.expression import Convolution, Normalisation
from repfuse.ops.convolution import geometry
from repfuse.ops.meaning import Combined, Convolved, Meaning, Normed, Same, Unfusible

Attribute = Callable[[str], Any]
Row = Callable[[dict[str, Any], Attribute], Meaning | None]


def function_meaning(node: fx.Node, attribute: Attribute) -> Meaning | None:
    """Return what a call_function or call_method node means; ``attribute`` gives a tensor of the model by name."""
    table: dict[Any, tuple[tuple[str, ...], Row]] = METHODS if node.op == "call_method" else FUNCTIONS
    if node.target not in table:
        return None
    names, row = table[node.target]
    if len(node.args) > len(names) or not all(name in names for name in node.kwargs):
        return None
    return row(dict(zip(names, node.args, strict=False)) | dict(node.kwargs), attribute)


def _convolution(given: dict[str, Any], attribute: Attribute) -> Meaning | None:
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if not isinstance(x, fx.Node):
        return None
    if not _stored(weight) or not (bias is None or _stored(bias)):
        return Unfusible("computed-weight", "the weight or bias of a functional convolution is computed in forward")
    usual = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    arguments = [given.get(name, value) for name, value in usual.items()]
    if _computed(arguments):
        return Unfusible("computed-weight", "the stride, padding, dilation or groups are computed in forward")
    shape = geometry(attribute(weight.target).shape, *arguments)
    return Convolved(x, Convolution(shape, weight.target, None if bias is None else bias.target))


def _batch_norm(given: dict[str, Any], _attribute: Attribute) -> Meaning | None:
    x, tensors = given["input"], [given.get(name) for name in ("running_mean", "running_var", "weight", "bias")]
    if given.get("training", False) is not False or not all(tensors[:2]):
        return Unfusible("training-norm", "F.batch_norm uses the statistics of the batch")
    if not all(tensor is None or _stored(tensor) for tensor in tensors) or not isinstance(x, fx.Node):
        return Unfusible("computed-weight", "statistics or affine parameters of F.batch_norm are computed in forward")
    mean, var, weight, bias = (None if tensor is None else str(tensor.target) for tensor in tensors)
    assert mean is not None and var is not None
    eps = given.get("eps", 1e-5)
    if _computed(eps):
        return Unfusible("computed-weight", "the eps of F.batch_norm is computed in forward")
    return Normed(x, Normalisation(mean, var, weight, bias, eps))


def _computed(value: Any) -> bool:
    return any(map(_computed, value)) if isinstance(value, list | tuple) else isinstance(value, fx.Node)


def _stored(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _combination(sign: float, in_place: bool = False, scaled: str = "other") -> Row:
    """Return the row of ``one + sign * alpha * scaled``, where ``one`` is the operand that is not ``scaled``."""
    plain = "input" if scaled == "other" else "other"

    def row(given: dict[str, Any], _attribute: Attribute) -> Meaning | None:
        alpha = given.get("alpha", 1)
        if not isinstance(alpha, int | float):
            return None
        return _sum([(given[plain], 1.0), (given[scaled], sign * alpha)], in_place)

    return row


def _sum(operands: list[tuple[Any, float]], in_place: bool) -> Meaning | None:
    """Return the sum of nodes; a literal zero, with which ``sum([...])`` and some blocks begin, adds nothing."""
    nodes = [(value, factor) for value, factor in operands if isinstance(value, fx.Node)]
    constants = [value for value, _ in operands if not isinstance(value, fx.Node)]
    if not nodes or any(not isinstance(value, int | float) or value != 0 for value in constants):
        return None
    return Same(nodes[0][0]) if len(nodes) == 1 and nodes[0][1] == 1 else Combined(tuple(nodes), in_place)


def _multiple(given: dict[str, Any], _attribute: Attribute) -> Meaning | None:
    left, right = given["input"], given["other"]
    node, factor = (left, right) if isinstance(left, fx.Node) else (right, left)
    if not isinstance(node, fx.Node) or isinstance(factor, bool) or not isinstance(factor, int | float):
        return None
    return _sum([(node, float(factor))], in_place=False)


def _quotient(given: dict[str, Any], _attribute: Attribute) -> Meaning | None:
    node, divisor = given["input"], given["other"]
    usable = isinstance(node, fx.Node) and isinstance(divisor, int | float) and divisor != 0
    return _sum([(node, 1.0 / divisor)], in_place=False) if usable and "rounding_mode" not in given else None


def _negation(given: dict[str, Any], _attribute: Attribute) -> Meaning | None:
    return Combined(((given["input"], -1.0),))


def _same(given: dict[str, Any], _attribute: Attribute) -> Meaning | None:
    return Same(given["input"]) if isinstance(given["input"], fx.Node) else None


def _dropout(given: dict[str, Any], attribute: Attribute) -> Meaning | None:
    return _same(given, attribute) if given.get("training", True) is False else None


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_TORCH_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
_PAIR = ("input", "other")
_PAIR_ALPHA = ("input", "other", "alpha")
_DROPOUT = ("input", "p", "training", "inplace")

_CONV_ROW: tuple[tuple[str, ...], Row] = (_CONV, _convolution)
_DROPOUT_ROW: tuple[tuple[str, ...], Row] = (_DROPOUT, _dropout)

FUNCTIONS: dict[Any, tuple[tuple[str, ...], Row]] = {
    F.conv1d: _CONV_ROW,
    F.conv2d: _CONV_ROW,
    F.conv3d: _CONV_ROW,
    F.batch_norm: (_NORM, _batch_norm),
    torch.batch_norm: (_TORCH_NORM, _batch_norm),
    operator.add: (_PAIR, _combination(1.0)),
    operator.iadd: (_PAIR, _combination(1.0, in_place=True)),
    torch.add: (_PAIR_ALPHA, _combination(1.0)),
    operator.sub: (_PAIR, _combination(-1.0)),
    operator.isub: (_PAIR, _combination(-1.0, in_place=True)),
    torch.sub: (_PAIR_ALPHA, _combination(-1.0)),
    torch.subtract: (_PAIR_ALPHA, _combination(-1.0)),
    torch.rsub: (_PAIR_ALPHA, _combination(-1.0, scaled="input")),
    operator.neg: (("input",), _negation),
    torch.neg: (("input",), _negation),
    operator.mul: (_PAIR, _multiple),
    torch.mul: (_PAIR, _multiple),
    operator.truediv: (_PAIR, _quotient),
    torch.div: ((*_PAIR, "rounding_mode"), _quotient),
    F.dropout: _DROPOUT_ROW,
    F.dropout1d: _DROPOUT_ROW,
    F.dropout2d: _DROPOUT_ROW,
    F.dropout3d: _DROPOUT_ROW,
    F.alpha_dropout: _DROPOUT_ROW,
    F.feature_alpha_dropout: _DROPOUT_ROW,
    torch.clone: (("input", "memory_format"), _same),
}

METHODS: dict[Any, tuple[tuple[str, ...], Row]] = {
    "add": (_PAIR_ALPHA, _combination(1.0)),
    "add_": (_PAIR_ALPHA, _combination(1.0, in_place=True)),
    "sub": (_PAIR_ALPHA, _combination(-1.0)),
    "sub_": (_PAIR_ALPHA, _combination(-1.0, in_place=True)),
    "neg": (("input",), _negation),
    "mul": (_PAIR, _multiple),
    "div": ((*_PAIR, "rounding_mode"), _quotient),
    "clone": (("input", "memory_format"), _same),
    "contiguous": (("input", "memory_format"), _same),
}
