"""What each ONNX operator does, in functions of torch: a row per operator.

A row takes what is known of a node before it runs, and returns the function of its inputs; None where this node is one
of those that torch has no function for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[..., Any]
Shape = tuple[int | str | None, ...]
"""Sizes, as far as they are fixed; those that are not by name, where they have one."""
Pads = list[tuple[int, int]]

FAR = 2**31 - 1
"""From here on the end of a slice is the end of the axis: exporters write the largest integer that they have."""


@dataclass(frozen=True)
class Known:
    """What is known of a node: its attributes, the ``version`` of the operators, how many outputs are read, the shapes
    of its inputs as far as they are fixed, and the values of those inputs that are constants, by their place.
    """

    attributes: dict[str, Any]
    version: int
    outputs: int = 1
    shapes: tuple[Shape | None, ...] = ()
    values: dict[int, Any] = field(default_factory=dict)
    given: tuple[bool, ...] = ()
    """Whether each input is there: one that is optional may be left out."""
    gives: Shape | None = None
    """What is known of the shape of the first output: what a Reshape or a Resize is told may be computed."""

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        return self.attributes.get(name, default)

    def said(self, name: str, place: int, default: Any = None) -> Any:
        """Return what some versions say as an attribute, and others as a constant input. Raises Computed where it is
        an input that is computed.
        """
        if name in self.attributes:
            return self.attributes[name]
        if not self.has(place):
            return default
        if place not in self.values:
            raise Computed
        return self.values[place]

    def has(self, place: int) -> bool:
        """Whether there is an input at this place."""
        return place < len(self.given) and self.given[place]

    def shape(self, place: int = 0) -> Shape:
        """Return the shape of an input. Raises Computed where it is not known."""
        shape = self.shapes[place] if place < len(self.shapes) else None
        if shape is None:
            raise Computed
        return shape

    def size(self, axis: int, place: int = 0) -> int:
        """Return the size of an input along an axis. Raises Computed where it is not fixed."""
        size = self.shape(place)[axis]
        if not isinstance(size, int):
            raise Computed
        return size

    def rank(self) -> int:
        """Return how many axes the first input has. Raises Computed where that is not known."""
        return len(self.shape())

    def kernel(self) -> list[int]:
        """Return the size of the window. Raises Computed where it is not known, or has too many axes for torch."""
        rank = len(self.shape(1)) if "kernel_shape" not in self.attributes else 0
        kernel = self.get("kernel_shape") or [self.size(axis, 1) for axis in range(2, rank)]
        if not 1 <= len(kernel) <= 3:
            raise Computed
        return list(kernel)


class Computed(Exception):
    """What torch has to be told as a number is computed while the network runs, or not known before."""


Row = Callable[[Known], Function | None]


class Window(NamedTuple):
    """What slides over space, a number per axis each: ``flat`` are the amounts of padding as torch wants them, from the
    last axis on; ``padding`` is given where both sides of each axis have the same.
    """

    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    flat: list[int]
    padding: list[int] | None

    @property
    def padded_by_pool(self) -> bool:
        """Whether a pool of torch can pad so much itself."""
        return self.padding is not None and all(2 * p <= k for p, k in zip(self.padding, self.kernel, strict=True))


def _window(known: Known) -> Window:
    """Return the window. Raises Computed where it depends on the size."""
    kernel = known.kernel()
    ones = [1] * len(kernel)
    stride, dilation = list(known.get("strides", ones)), list(known.get("dilations", ones))
    pads, how = [(0, 0)] * len(kernel), known.get("auto_pad", "NOTSET")
    if how == "NOTSET":
        said = known.get("pads", [0] * 2 * len(kernel))
        pads = list(zip(said[: len(kernel)], said[len(kernel) :], strict=True))
    elif how != "VALID":
        for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
            reach, size = d * (k - 1) + 1, 0 if s == 1 else known.size(axis + 2)
            total = reach - 1 if s == 1 else max((-(-size // s) - 1) * s + reach - size, 0)
            small, large = total // 2, total - total // 2
            pads[axis] = (small, large) if how == "SAME_UPPER" else (large, small)
    even = all(before == after for before, after in pads)
    return Window(kernel, stride, dilation, _flat(pads), [before for before, _ in pads] if even else None)


def _flat(pads: Pads) -> list[int]:
    """Return amounts as torch wants them: from the last axis on."""
    return [amount for pair in reversed(pads) for amount in pair]


def _conv(known: Known) -> Function | None:
    kernel, stride, dilation, flat, padding = _window(known)
    convolve: Function = (torch.conv1d, torch.conv2d, torch.conv3d)[len(kernel) - 1]
    groups, none = known.get("group", 1), [0] * len(kernel)
    if padding is not None:
        return lambda x, w, b=None: convolve(x, w, b, stride, padding, dilation, groups)
    return lambda x, w, b=None: convolve(F.pad(x, flat), w, b, stride, none, dilation, groups)


def _conv_transpose(known: Known) -> Function | None:
    kernel, stride, dilation, flat, padding = _window(known)
    if known.get("output_shape") or known.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    convolve: Function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(kernel) - 1]
    groups, none = known.get("group", 1), [0] * len(kernel)
    more = list(known.get("output_padding") or none)
    if padding is not None:
        return lambda x, w, b=None: convolve(x, w, b, stride, padding, more, groups, dilation)
    crop = [-amount for amount in flat]
    return lambda x, w, b=None: F.pad(convolve(x, w, b, stride, none, more, groups, dilation), crop)


def _batch_norm(known: Known) -> Function | None:
    eps, training = known.get("epsilon", 1e-5), known.get("training_mode", 0)
    if known.outputs > 1 or known.get("spatial", 1) != 1:
        return None
    if training:  # statistics of the batch; the running ones go to other outputs
        return lambda x, w, b, _mean, _var: F.batch_norm(x, None, None, w, b, True, 0.0, eps)
    return lambda x, w, b, mean, var: F.batch_norm(x, mean, var, w, b, False, 0.0, eps)


def _gemm(known: Known) -> Function | None:
    alpha, beta = known.get("alpha", 1.0), known.get("beta", 1.0)
    turns_a, turns_b = known.get("transA", 0), known.get("transB", 0)
    if alpha == beta == 1 and turns_b and not turns_a and (not known.has(2) or len(known.shape(2)) == 1):
        return lambda a, b, c=None: F.linear(a, b, c)

    def gemm(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        product = torch.matmul(a.t() if turns_a else a, b.t() if turns_b else b)
        product = product if alpha == 1 else product * alpha
        return product if c is None else product + (c if beta == 1 else c * beta)

    return gemm


def _average_pool(known: Known) -> Function | None:
    window = _window(known)
    kernel, stride, dilation, flat, padding = window
    pool: Function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    rounds_up, counts = bool(known.get("ceil_mode", 0)), bool(known.get("count_include_pad", 0))
    if set(dilation) != {1} or (padding is None and rounds_up):
        return None
    if window.padded_by_pool:
        return lambda x: pool(x, kernel, stride, padding, rounds_up, counts)
    if counts:
        return lambda x: pool(F.pad(x, flat), kernel, stride, 0, rounds_up)

    def mean_of_what_is_there(x: Tensor) -> Tensor:
        total: Tensor = pool(F.pad(x, flat), kernel, stride)
        there: Tensor = pool(F.pad(torch.ones_like(x), flat), kernel, stride)
        return total / there

    return mean_of_what_is_there


def _max_pool(known: Known) -> Function | None:
    if known.outputs > 1:
        return None
    window = _window(known)
    kernel, stride, dilation, flat, padding = window
    pool: Function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    rounds_up = bool(known.get("ceil_mode", 0))
    if window.padded_by_pool:
        return lambda x: pool(x, kernel, stride, padding, dilation, rounds_up)
    return lambda x: pool(F.pad(x, flat, value=-math.inf), kernel, stride, 0, dilation, rounds_up)


def _pad(known: Known) -> Function | None:
    rank = known.rank()
    amounts = known.said("pads", 1)
    value = known.said("value", 2, 0.0)
    axes = known.said("axes", 3) or list(range(rank))
    pairs = [(0, 0)] * rank
    for axis, before, after in zip(axes, amounts[: len(axes)], amounts[len(axes) :], strict=True):
        pairs[axis % rank] = (before, after)
    mode = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}.get(known.get("mode", "constant"))
    if mode is None:
        first = next((axis for axis, pair in enumerate(pairs) if any(pair)), rank - 1)
        flat = _flat(pairs[first:])
        return lambda x, *_: F.pad(x, flat, value=value)
    spatial = pairs[2:]
    if any(map(any, pairs[:2])) or not 1 <= len(spatial) <= 3 or min(map(min, spatial)) < 0:
        return None
    return lambda x, *_: F.pad(x, _flat(spatial), mode=mode)


def _clip(known: Known) -> Function | None:
    low, high = known.said("min", 1), known.said("max", 2)
    return lambda x, *_: x if low is None and high is None else torch.clamp(x, low, high)


def _slice(known: Known) -> Function | None:
    starts, ends = known.said("starts", 1), known.said("ends", 2)
    axes, steps = known.said("axes", 3), known.said("steps", 4)
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    if min(steps, default=1) < 1:
        return None
    rank = known.rank() if min(axes, default=0) < 0 else max(axes, default=0) + 1
    index = [slice(None)] * rank
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        index[axis % rank] = slice(start or None, None if end >= FAR else end, step)
    return lambda x, *_: x[tuple(index)]


def _gather(known: Known) -> Function | None:
    axis, places = known.get("axis", 0), known.values.get(1)
    if isinstance(places, int):
        return lambda x, *_: x.select(axis, places)
    if places is None or not all(isinstance(place, int) for place in places):
        return None
    if min(places, default=0) >= 0:
        return lambda x, index: torch.index_select(x, axis, index)
    size = known.size(axis)
    return lambda x, index: torch.index_select(x, axis, torch.remainder(index, size))


def _split(known: Known) -> Function | None:
    axis, sizes = known.get("axis", 0), known.said("split", 1)
    count = known.get("num_outputs", known.outputs)
    if sizes is None:
        return lambda x, *_: torch.chunk(x, count, axis)
    return lambda x, *_: torch.split(x, sizes, axis)


def _reshape(known: Known) -> Function | None:
    kept = not known.get("allowzero", 0)
    if 1 in known.values or "shape" in known.attributes:
        said = known.said("shape", 1)
        wanted: list[Any] = [str(axis) if n == 0 and kept else n for axis, n in enumerate(said)]
    else:  # computed of sizes that the input has, too
        own, sizes = known.shape(), known.gives or ()
        wanted = [n if isinstance(n, int) else str(own.index(n)) if n is not None and n in own else -1 for n in sizes]
        if not wanted or wanted.count(-1) > 1:
            raise Computed
    return lambda x, *_: x.reshape([x.size(int(n)) if isinstance(n, str) else n for n in wanted])


def _flatten(known: Known) -> Function | None:
    axis = known.get("axis", 1)
    if axis == 1:
        return lambda x: torch.flatten(x, 1)
    rank = known.rank()
    at = axis + rank if axis < 0 else axis
    if at == 0:
        return lambda x: x.reshape(1, -1)
    if at == rank - 1:
        return lambda x: x.flatten(0, -2)
    return lambda x: x.flatten(0, at - 1).flatten(1) if at < rank else x.reshape(-1, 1)


def _squeeze(known: Known) -> Function | None:
    axes = known.said("axes", 1)
    return (lambda x, *_: x.squeeze()) if axes is None else (lambda x, *_: x.squeeze(tuple(axes)))


def _unsqueeze(known: Known) -> Function | None:
    axes = known.said("axes", 1)
    if min(axes) < 0 and len(axes) > 1:
        rank = known.rank() + len(axes)
        axes = [axis % rank for axis in axes]
    return lambda x, *_: reduce(lambda y, axis: y.unsqueeze(axis), sorted(axes), x)


def _cast(known: Known) -> Function | None:
    dtype = DTYPES.get(known.get("to"))
    return None if dtype is None else lambda x: x.to(dtype)


def _depth_to_space(known: Known) -> Function | None:
    factor = known.get("blocksize")
    if known.get("mode", "DCR") == "CRD":
        return lambda x: F.pixel_shuffle(x, factor)

    def shuffle(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        parted = x.reshape(n, factor, factor, c // factor**2, h, w)
        return parted.permute(0, 3, 4, 1, 5, 2).reshape(n, c // factor**2, h * factor, w * factor)

    return shuffle


def _space_to_depth(known: Known) -> Function | None:
    factor = known.get("blocksize")

    def unshuffle(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        parted = x.reshape(n, c, h // factor, factor, w // factor, factor)
        return parted.permute(0, 3, 5, 1, 2, 4).reshape(n, c * factor**2, h // factor, w // factor)

    return unshuffle


def _softmax(function: Function) -> Row:
    def row(known: Known) -> Function | None:
        if known.version >= 13:
            axis = known.get("axis", -1)
            return lambda x: function(x, axis)
        axis = known.get("axis", 1)  # over all axes from this one on
        return (lambda x: function(x, axis)) if axis in (-1, known.rank() - 1) else None

    return row


def _reduced(function: Callable[[Tensor, Any, bool], Tensor]) -> Row:
    def row(known: Known) -> Function | None:
        axes, keeps = known.said("axes", 1), bool(known.get("keepdims", 1))
        if axes is None:
            if known.get("noop_with_empty_axes", 0):
                return None
            axes = list(range(known.rank()))
        return lambda x, *_: function(x, axes, keeps)

    return row


def _resize(known: Known) -> Function | None:
    mode, place = known.get("mode", "nearest"), known.get("coordinate_transformation_mode", "half_pixel")
    if known.get("antialias", 0) or known.get("axes") is not None or known.rank() != 4:
        return None
    if known.has(3):
        whole = known.gives or ()
        size = [n for n in whole[2:] if isinstance(n, int)]
        if whole[:2] != known.shape()[:2] or len(size) != 2:
            return None
        told: dict[str, Any] = {"size": size}
    else:
        scales = known.said("scales", 2, [1.0])
        if len(scales) != 4 or scales[:2] != [1, 1]:
            return None
        told = {"scale_factor": scales[2:]}
    whole_steps = all(float(scale).is_integer() for scale in told.get("scale_factor", [0.5]))
    floors = place == "asymmetric" and known.get("nearest_mode", "round_prefer_floor") == "floor"
    if mode == "nearest" and (floors or (place == "half_pixel" and whole_steps)):
        return lambda x, *_: F.interpolate(x, mode="nearest", **told)
    if mode == "linear" and place in ("half_pixel", "pytorch_half_pixel") and ("size" in told or whole_steps):
        return lambda x, *_: F.interpolate(x, mode="bilinear", **told)
    return None


def _dropout(known: Known) -> Function | None:
    if known.outputs > 1 or known.said("training_mode", 2, False):
        return None
    return lambda x, *_: x


def _plain(function: Function) -> Row:
    """Return the row of an operator that has no attributes."""
    return lambda _: function


def _told(function: Function, name: str, default: Any, ours: str = "") -> Row:
    """Return the row of an operator whose one attribute is an argument of the function, which may call it ``ours``."""
    return lambda known: partial(function, **{ours or name: known.get(name, default)})


def _hard_sigmoid(known: Known) -> Function:
    alpha, beta = known.get("alpha", 0.2), known.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-7 and beta == 0.5:  # as torch means it, and its exporters write it
        return F.hardsigmoid
    return lambda x: torch.clamp(x * alpha + beta, 0, 1)


def _layer_norm(known: Known) -> Function | None:
    axis, eps = known.get("axis", -1), known.get("epsilon", 1e-5)
    sizes = [known.size(place, 1) for place in range(len(known.shape(1)))]
    if known.outputs > 1 or len(sizes) != (-axis if axis < 0 else known.rank() - axis):
        return None
    return lambda x, w, b=None: F.layer_norm(x, sizes, w, b, eps)


def _expand(known: Known) -> Function:
    wanted = known.said("shape", 1)
    wanted = [1] * (known.rank() - len(wanted)) + wanted
    sizes = [-1 if n == 1 else n for n in wanted]
    if any(n == 1 for n in wanted[: len(wanted) - known.rank()]):
        raise Computed
    return lambda x, *_: x.expand(sizes)


def _divide(x: Tensor, y: Tensor) -> Tensor:
    whole = not (x.dtype.is_floating_point or y.dtype.is_floating_point)
    return torch.div(x, y, rounding_mode="trunc" if whole else None)


ROWS: dict[str, Row] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "BatchNormalization": _batch_norm,
    "Gemm": _gemm,
    "MatMul": _plain(torch.matmul),
    "Add": _plain(torch.add),
    "Sub": _plain(torch.sub),
    "Mul": _plain(torch.mul),
    "Div": _plain(_divide),
    "Sum": _plain(lambda *addends: reduce(torch.add, addends)),
    "Neg": _plain(torch.neg),
    "Pow": _plain(torch.pow),
    "Where": _plain(torch.where),
    "PRelu": _plain(lambda x, slope: torch.where(x >= 0, x, x * slope)),
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
    "GlobalAveragePool": lambda known: partial(Tensor.mean, dim=[*range(2, known.rank())], keepdim=True),
    "GlobalMaxPool": lambda known: partial(Tensor.amax, dim=[*range(2, known.rank())], keepdim=True),
    "ReduceMean": _reduced(lambda x, axes, keeps: x.mean(axes, keepdim=keeps)),
    "ReduceSum": _reduced(lambda x, axes, keeps: x.sum(axes, keepdim=keeps)),
    "ReduceMax": _reduced(lambda x, axes, keeps: x.amax(axes, keepdim=keeps)),
    "ReduceMin": _reduced(lambda x, axes, keeps: x.amin(axes, keepdim=keeps)),
    "Pad": _pad,
    "Clip": _clip,
    "Slice": _slice,
    "Gather": _gather,
    "ReduceL1": _reduced(lambda x, axes, keeps: x.abs().sum(axes, keepdim=keeps)),
    "ReduceL2": _reduced(lambda x, axes, keeps: torch.linalg.vector_norm(x, dim=axes, keepdim=keeps)),
    "ReduceSumSquare": _reduced(lambda x, axes, keeps: (x * x).sum(axes, keepdim=keeps)),
    "Einsum": lambda known: partial(torch.einsum, known.get("equation")),
    "Concat": lambda known: lambda *parts: torch.cat(parts, known.get("axis")),
    "Split": _split,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda known: partial(torch.permute, dims=known.get("perm") or list(reversed(range(known.rank())))),
    "Expand": _expand,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Resize": _resize,
    "Cast": _cast,
    "Dropout": _dropout,
    "Identity": _plain(lambda x: x),
    "Relu": _plain(F.relu),
    "LeakyRelu": _told(F.leaky_relu, "alpha", 0.01, "negative_slope"),
    "Elu": _told(F.elu, "alpha", 1.0),
    "Sigmoid": _plain(torch.sigmoid),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _plain(F.hardswish),
    "Tanh": _plain(torch.tanh),
    "Softplus": _plain(F.softplus),
    "Mish": _plain(F.mish),
    "Gelu": _told(F.gelu, "approximate", "none"),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Log": _plain(torch.log),
    "Sqrt": _plain(torch.sqrt),
    "Reciprocal": _plain(torch.reciprocal),
    "Abs": _plain(torch.abs),
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    "LayerNormalization": _layer_norm,
    "InstanceNormalization": lambda known: (
        lambda x, w, b: F.instance_norm(x, None, None, w, b, True, 0.0, known.get("epsilon", 1e-5))
    ),
}

VALUES = {
    "Reshape": (1,), "Pad": (1, 2, 3), "Clip": (1, 2), "Slice": (1, 2, 3, 4), "Gather": (1,), "Split": (1,),
    "Squeeze": (1,), "Unsqueeze": (1,), "Expand": (1,), "Resize": (1, 2, 3), "Dropout": (2,),
    **{f"Reduce{kind}": (1,) for kind in ("Mean", "Sum", "Max", "Min", "L1", "L2", "SumSquare")},
}  # fmt: skip
"""The inputs that torch has to be told as numbers, by their places."""

DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
"""The dtypes of torch by ONNX's number."""


def function_of(kind: str, known: Known) -> Function | None:
    """Return what an operator of ONNX's own domain does, or None where torch has no function for it."""
    row = ROWS.get(kind)
    try:
        return None if row is None else row(known)
    except Computed:
        return None
