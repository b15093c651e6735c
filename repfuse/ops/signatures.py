"""The operators that repfuse knows, their arguments, and all their names.

A new spelling of an operator is a row of ``ALIASES`` or ``FUNCTIONS``, a new operator a row of ``SIGNATURES``.
"""

from __future__ import annotations

import builtins
import operator
from typing import Any

import torch
from torch.nn import functional as F

_CONVOLUTION = "input weight bias stride padding dilation groups"
_POOL = "input kernel_size stride padding ceil_mode count_include_pad divisor_override"
_DROPOUT = "input p training inplace"
_NORM = "input weight bias running_mean running_var training momentum eps cudnn_enabled"
_CAST = "dtype layout device pin_memory non_blocking copy memory_format other"

# Argument names in the order of torch's own function. A name with a star takes all that follow: x.view(2, 3).
SIGNATURES: dict[str, str] = {
    "conv1d": _CONVOLUTION,
    "conv2d": _CONVOLUTION,
    "conv3d": _CONVOLUTION,
    "convolution": "input weight bias stride padding dilation transposed output_padding groups",
    **{f"conv_transpose{n}d": "input weight bias stride padding output_padding groups dilation" for n in (1, 2, 3)},
    "linear": "input weight bias",
    "matmul": "input other",
    "addmm": "input mat1 mat2 beta alpha",
    "batch_norm": _NORM,
    "native_batch_norm": "input weight bias running_mean running_var training momentum eps",
    "_native_batch_norm_legit_no_training": "input weight bias running_mean running_var momentum eps",
    "instance_norm": "input weight bias running_mean running_var use_input_stats momentum eps cudnn_enabled",
    "add": "input other alpha",
    "sub": "input other alpha",
    "rsub": "input other alpha",
    "mul": "input other",
    "div": "input other rounding_mode",
    "neg": "input",
    "lerp": "input end weight",
    "stack": "tensors dim",
    "sum": "input dim keepdim dtype",
    "mean": "input dim keepdim dtype",
    "pad": "input pad mode value",
    "constant_pad_nd": "input pad value",
    "reflection_pad1d": "input pad",
    "reflection_pad2d": "input pad",
    "reflection_pad3d": "input pad",
    "replication_pad1d": "input pad",
    "replication_pad2d": "input pad",
    "replication_pad3d": "input pad",
    "avg_pool1d": _POOL,
    "avg_pool2d": _POOL,
    "avg_pool3d": _POOL,
    "getitem": "input index",
    "slice": "input dim start end step",
    "narrow": "input dim start length",
    "flip": "input dims*",
    "cat": "tensors dim",
    "chunk": "input chunks dim",
    "split": "input sizes dim",
    "tensor_split": "input sizes dim",
    "channel_shuffle": "input groups",
    "view": "input size*",
    "transpose": "input dim0 dim1",
    "permute": "input dims*",
    "flatten": "input start_dim end_dim",
    "t": "input",
    "getattr": "input attribute",
    "size": "input dim",
    "floordiv": "input other",
    "dropout": _DROPOUT,
    "dropout1d": _DROPOUT,
    "dropout2d": _DROPOUT,
    "dropout3d": _DROPOUT,
    "feature_dropout": _DROPOUT,
    "alpha_dropout": _DROPOUT,
    "feature_alpha_dropout": _DROPOUT,
    "clone": "input memory_format",
    "contiguous": "input memory_format",
    "detach": "input",
    "positive": "input",
    "to": f"input target* {_CAST}",
    "type": "input dtype non_blocking",
    "type_as": "input other",
    "float": "input memory_format",
    "double": "input memory_format",
    "half": "input memory_format",
    "bfloat16": "input memory_format",
    "cpu": "input memory_format",
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
    "concat": "cat",
    "concatenate": "cat",
    "split_with_sizes": "split",
    "native_channel_shuffle": "channel_shuffle",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "reshape": "view",
    "_unsafe_view": "view",
    "sym_size": "size",
    "floor_divide": "floordiv",
    "alias": "detach",
    "lift_fresh_copy": "clone",
    "numpy_T": "t",
    "_to_copy": "to",
    "_native_batch_norm_legit": "native_batch_norm",
}

RENAMED = {
    "self": "input",
    "tensor": "input",
    "mat2": "other",
    "train": "training",
    "shape": "size",
    "padding": "pad",
    "split_size": "sizes",
    "split_sizes": "sizes",
    "split_size_or_sections": "sizes",
    "indices_or_sections": "sizes",
    "sections": "sizes",
    "indices": "sizes",
    "axis": "dim",
    "axis0": "dim0",
    "axis1": "dim1",
}
"""Other names of arguments, used where the signature has the new name and not the old one."""

IN_PLACE = frozenset({"add", "sub", "mul", "div", "neg", "lerp", "dropout", "feature_dropout", "alpha_dropout"})

FUNCTIONS: dict[Any, str] = {
    operator.add: "add",
    operator.iadd: "add_",
    operator.sub: "sub",
    operator.isub: "sub_",
    operator.mul: "mul",
    operator.imul: "mul_",
    operator.truediv: "div",
    operator.itruediv: "div_",
    operator.neg: "neg",
    operator.pos: "positive",
    operator.matmul: "matmul",
    operator.getitem: "getitem",
    operator.floordiv: "floordiv",
    builtins.getattr: "getattr",
}
FUNCTIONS |= {
    getattr(package, name): name
    for package in (torch, F)
    for name in [*SIGNATURES, *ALIASES, *(f"{name}_" for name in IN_PLACE)]
    if callable(getattr(package, name, None))
}

# By module and name: torchvision is not imported for it.
FOREIGN = {
    ("repfuse.recording.assignment", "assigned"): "assigned",
}

# Functions whose arguments stand in another order than those of the torch function of their name.
OWN_SIGNATURES: dict[Any, str] = {
    F.batch_norm: "input running_mean running_var weight bias training momentum eps",
    F.instance_norm: "input running_mean running_var weight bias use_input_stats momentum eps",
}
