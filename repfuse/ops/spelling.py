"""A graph node as a call of an operator, whichever way it is spelled.

Functions of torch and torch.nn.functional, operators, tensor methods and ATen overloads are translated into one
signature per operator, with the argument names of torch.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import fx
from torch._ops import OpOverload
from torch.nn import functional as F

from repfuse.recording.constants import called
from repfuse.recording.recording import Recording
from repfuse.recording.run import assigned

# A call of an operator: its name, its arguments by name, and what they are.


class Constant(NamedTuple):
    """A tensor that depends on parameters and buffers alone: name (see ``repfuse.algebra.layers``) and shape."""

    name: str
    shape: tuple[int, ...]


class Call(NamedTuple):
    """What ``node`` calls: ``operator`` is a key of ``repfuse.ops.table.ROWS``."""

    node: fx.Node
    operator: str
    given: Mapping[str, Any]
    in_place: bool = False

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument, or ``default`` where the call leaves it out."""
        return self.given.get(name, default)

    @property
    def input(self) -> Any:
        """The first argument of nearly every operator."""
        return self.given.get("input")


def is_data(value: Any, recording: Recording) -> TypeGuard[fx.Node]:
    """Whether the value is a tensor that depends on the input of the model."""
    return isinstance(value, fx.Node) and value in recording.shape_of and recording.constants.name_of(value) is None


def constant(value: Any, recording: Recording) -> Constant | None:
    """Return the constant that an argument is, or None."""
    name = recording.constants.name_of(value)
    return None if name is None else Constant(name, recording.constants.shape(name))


def spread(value: Any, recording: Recording) -> Constant | None:
    """Return the constant that an argument is once for each of the places of something: ``w.expand_as(x)``."""
    call = spelled(value) if isinstance(value, fx.Node) and operator_of(value) in SPREADING else None
    return None if call is None else constant(call.input, recording)


SPREADING = ("expand", "expand_as", "repeat")


def number(value: Any) -> float | None:
    """Return a finite number that is written in the code, or None."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def makes_zeros(node: fx.Node) -> bool:
    """Whether a node returns a new tensor of zeros."""
    return called(node) in ("zeros", "zeros_like")


def is_integer(value: Any) -> bool:
    """Whether an argument is an integer written in the code."""
    return isinstance(value, int) and not isinstance(value, bool)


def contains_node(value: Any) -> bool:
    """Whether an argument, or anything in its lists, is computed in forward."""
    return any(map(contains_node, value)) if isinstance(value, list | tuple) else isinstance(value, fx.Node)


def axis_of(dim: Any, rank: int) -> int | None:
    """Return the axis that ``dim`` names among ``rank``, counted from the front; None where it is not a literal."""
    return dim % rank if is_integer(dim) and -rank <= dim < rank else None


def is_channel_axis(axis: int | None, rank: int) -> TypeGuard[int]:
    """Whether the axis may hold the channels: axis 1 for convolutions, the last for linear layers."""
    return axis is not None and axis > 0 and axis in (1, rank - 1)


TURNING = ("transpose", "permute", "movedim", "t", "getattr")
"""Operators that put axes in another order: ``x.mT`` gets an attribute."""


def axes_turned(call: Call, rank: int) -> list[int] | None:
    """Return the axes, of ``rank``, in the order in which a transpose or a permutation puts them, as PyTorch does."""
    if call.operator not in TURNING:
        return None
    how = [call.get(name.rstrip("*")) for name in SIGNATURES[call.operator].split()[1:]]
    if contains_node(how):
        return None
    axes = torch.empty(tuple(range(rank)), device="meta")
    if call.operator == "getattr":
        return list(getattr(axes, how[0]).shape) if how[0] in ("T", "mT") and rank > 1 else None
    try:
        return list(getattr(axes, call.operator)(*how).shape)
    except (RuntimeError, IndexError):  # of another rank
        return None


# The operators that repfuse knows, their arguments, and all their names.
#
# A new spelling of an operator is a row of ``ALIASES`` or ``FUNCTIONS``, a new operator a row of ``SIGNATURES``.


_POOL = "input kernel_size stride padding ceil_mode count_include_pad divisor_override"
DROPOUTS = [
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
]
CASTS = ["float", "double", "half", "bfloat16", "cpu"]
_NORM = "input weight bias running_mean running_var training momentum eps cudnn_enabled"
_CAST = "dtype layout device pin_memory non_blocking copy memory_format other"

_RESIZED = (
    "input size scale_factor mode align_corners recompute_scale_factor antialias "
    "output_size scale_factors scales scales_d scales_h scales_w"
)
RESIZING = (
    "interpolate", "upsample", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
    *(f"upsample_nearest{ndim}d" for ndim in (1, 2, 3)),
)  # fmt: skip
"""Operators whose pixels are means of pixels."""

# Argument names in the order of torch's own function. A name with a star takes all that follow: x.view(2, 3).
SIGNATURES: dict[str, str] = {
    **{f"conv{n}d": "input weight bias stride padding dilation groups" for n in (1, 2, 3)},
    "convolution": "input weight bias stride padding dilation transposed output_padding groups",
    **{f"conv_transpose{n}d": "input weight bias stride padding output_padding groups dilation" for n in (1, 2, 3)},
    "linear": "input weight bias",
    "matmul": "input other",
    "einsum": "equation operands* path",
    "tensordot": "input other dims out dims_self dims_other",
    "expand": "input size* implicit",
    "expand_as": "input other",
    "repeat": "input repeats*",
    "addmm": "input mat1 mat2 beta alpha",
    "batch_norm": _NORM,
    "native_batch_norm": "input weight bias running_mean running_var training momentum eps",
    "_native_batch_norm_legit_no_training": "input weight bias running_mean running_var momentum eps",
    "instance_norm": "input weight bias running_mean running_var use_input_stats momentum eps cudnn_enabled",
    "layer_norm": "input normalized_shape weight bias eps cudnn_enable",
    "rms_norm": "input normalized_shape weight eps",
    "group_norm": "input num_groups weight bias eps cudnn_enabled",
    "embedding": "weight indices padding_idx scale_grad_by_freq sparse",
    "add": "input other alpha",
    "sub": "input other alpha",
    "rsub": "input other alpha",
    "mul": "input other",
    "div": "input other rounding_mode",
    "neg": "input",
    "lerp": "input end weight",
    "addcmul": "input tensor1 tensor2 value",
    "stack": "tensors dim",
    "sum": "input dim keepdim dtype",
    "mean": "input dim keepdim dtype",
    "pad": "input pad mode value",
    "constant_pad_nd": "input pad value",
    **{f"{how}_pad{n}d": "input pad" for how in ("reflection", "replication") for n in (1, 2, 3)},
    **{f"avg_pool{n}d": _POOL for n in (1, 2, 3)},
    "getitem": "input index",
    "slice": "input dim start end step",
    "narrow": "input dim start length",
    "flip": "input dims*",
    "roll": "input shifts dims",
    "index": "input indices",
    "index_select": "input dim index",
    "select": "input dim index",
    "repeat_interleave": "input repeats dim output_size",
    "cat": "tensors dim",
    "hstack": "tensors",
    "chunk": "input chunks dim",
    "split": "input sizes dim",
    "tensor_split": "input sizes dim",
    "channel_shuffle": "input groups",
    "pixel_unshuffle": "input downscale_factor",
    "pixel_shuffle": "input upscale_factor",
    **dict.fromkeys(RESIZING, _RESIZED),
    "view": "input size*",
    "transpose": "input dim0 dim1",
    "permute": "input dims*",
    "movedim": "input source destination",
    "flatten": "input start_dim end_dim",
    "view_as": "input other",
    "unflatten": "input dim size",
    "squeeze": "input dim*",
    "unsqueeze": "input dim",
    **{f"adaptive_avg_pool{n}d": "input output_size" for n in (1, 2, 3)},
    "t": "input",
    "getattr": "input attribute",
    **dict.fromkeys(DROPOUTS, "input p training inplace"),
    **dict.fromkeys(("clone", "contiguous", *CASTS), "input memory_format"),
    "detach": "input",
    "positive": "input",
    "to": f"input target* {_CAST}",
    "type": "input dtype non_blocking",
    "cuda": "input device non_blocking memory_format",
    "assigned": "input index value",
    "fake_quantize_per_tensor_affine": "input scale zero_point quant_min quant_max",
    "fake_quantize_per_channel_affine": "input scale zero_point axis quant_min quant_max",
}

ALIASES = {
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "mm": "matmul",
    "bmm": "matmul",
    "concat": "cat",
    "concatenate": "cat",
    "split_with_sizes": "split",
    "native_channel_shuffle": "channel_shuffle",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "reshape": "view",
    "reshape_as": "view_as",
    "_unsafe_view": "view",
    "broadcast_to": "expand",
    "tile": "repeat",
    "alias": "detach",
    "lift_fresh_copy": "clone",
    "numpy_T": "t",
    "_to_copy": "to",
    "_native_batch_norm_legit": "native_batch_norm",
}

RENAMED = {
    "self": "input",
    "mat2": "other",
    "tensors": "operands",
    "train": "training",
    "shape": "size",
    "sizes": "size",
    "padding": "pad",
    "split_size": "sizes",
    "split_sizes": "sizes",
    "sections": "sizes",
    "tensor_indices_or_sections": "sizes",
    "dims": "repeats",
    "indices": "sizes",
    "axis": "dim",
    "axis0": "dim0",
    "axis1": "dim1",
}
"""Other names of arguments, used where the signature has the new name and not the old one."""

IN_PLACE = frozenset(
    {"add", "sub", "mul", "div", "neg", "lerp", "addcmul", "dropout", "feature_dropout", "alpha_dropout"}
)

FUNCTIONS: dict[Any, str] = {
    operator.sub: "sub",
    operator.truediv: "div",
    operator.itruediv: "div_",
    operator.matmul: "matmul",
    operator.getitem: "getitem",
    builtins.getattr: "getattr",
    assigned: "assigned",
}
FUNCTIONS |= {
    getattr(package, name): name
    for package in (torch, F)
    for name in [*SIGNATURES, *ALIASES, *(f"{name}_" for name in IN_PLACE)]
    if callable(getattr(package, name, None))
}

# Functions whose arguments stand in another order than those of the torch function of their name.
OWN_SIGNATURES: dict[Any, str] = {
    F.embedding: "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse",
    F.batch_norm: "input running_mean running_var weight bias training momentum eps",
    F.instance_norm: "input running_mean running_var weight bias use_input_stats momentum eps",
}


def spelled(node: fx.Node) -> Call | None:
    """Return what a call_function or call_method node calls, or None where it is no operator that repfuse knows."""
    found = _operator(_spelled_name(node))
    if found is None:
        return None
    kind, in_place = found
    names, star = _parsed(OWN_SIGNATURES.get(node.target, SIGNATURES[kind]))
    given = _bound_by_schema(node, names) if isinstance(node.target, OpOverload) else _bound(node, names, star)
    return None if given is None else Call(node, kind, given, in_place)


def operator_of(node: fx.Node) -> str | None:
    """Return the operator of what ``spelled`` returns, without a look at the arguments."""
    found = _operator(_spelled_name(node))
    return None if found is None else found[0]


@cache
def _operator(name: str | None) -> tuple[str, bool] | None:
    """Return the operator that a function or method of this name is, and whether in place; None where it is none."""
    if name is None:
        return None
    plain = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    kind = ALIASES.get(plain, plain)
    in_place = plain != name
    return None if kind not in SIGNATURES or (in_place and kind not in IN_PLACE) else (kind, in_place)


@cache
def _parsed(signature: str) -> tuple[tuple[str, ...], int | None]:
    """Return the names of a signature's arguments, and the place of the one that takes all that is left."""
    names = signature.split()
    return tuple(name.rstrip("*") for name in names), next((i for i, x in enumerate(names) if x.endswith("*")), None)


def _spelled_name(node: fx.Node) -> str | None:
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return None
    if isinstance(node.target, OpOverload):
        namespace, _, name = node.target._schema.name.partition("::")
        return name if namespace == "aten" else None
    return FUNCTIONS.get(node.target)


def _bound(node: fx.Node, names: Sequence[str], star: int | None) -> dict[str, Any] | None:
    """Bind the arguments of a function or method: by position, then by name."""
    if star is None:
        values = node.args
    else:
        rest = node.args[star:]
        single = len(rest) == 1 and isinstance(rest[0], list | tuple)
        values = (*node.args[:star], *((rest[0] if single else rest,) if rest else ()))
    if len(values) > len(names):
        return None
    return _merged(dict(zip(names, values, strict=False)), node.kwargs, names)


def _bound_by_schema(node: fx.Node, names: Sequence[str]) -> dict[str, Any] | None:
    """Bind the arguments of an ATen overload, with the defaults that its schema states."""
    assert isinstance(node.target, OpOverload)
    arguments = node.target._schema.arguments
    given = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    given |= dict(zip([argument.name for argument in arguments], node.args, strict=False)) | dict(node.kwargs)
    return _merged({}, given, names)


def _merged(first: dict[str, Any], by_name: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    """Add arguments given by name, whatever they are called there; None where the signature has no such argument."""
    for other, value in by_name.items():
        name = other if other in names else RENAMED.get(other, other)
        if name not in names or name in first:
            return None
        first[name] = value
    return first
