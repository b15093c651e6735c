"""What each operator means: a row per operator, whatever its spelling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import fx

from repfuse.ops import channels, convolution, filters, indexing, products, sums
from repfuse.ops.meaning import Meaning, Same
from repfuse.ops.spelling import RESIZING, Call, is_data, spelled
from repfuse.recording.recording import Recording

# Operators that return their input in inference. Whether a cast changes the dtype, the shapes tell the planner.


def same(call: Call, recording: Recording) -> Meaning | None:
    """``y = x``."""
    return Same(call.input) if is_data(call.input, recording) else None


def dropout(call: Call, recording: Recording) -> Meaning | None:
    """``y = x`` unless it drops."""
    return same(call, recording) if call.get("training", True) is False else None


def cast(call: Call, recording: Recording) -> Meaning | None:
    """``x.type(dtype)``; without an argument, it is a string."""
    return None if call.get("dtype") is None else same(call, recording)


def attribute(call: Call, recording: Recording) -> Meaning | None:
    """``x.data``."""
    return same(call, recording) if call.get("attribute") == "data" else None


Row = Callable[[Call, Recording], Meaning | None]


def _item(call: Call, recording: Recording) -> Meaning | None:
    """``x[index]``: a part of a tensor, or one of the values that a node returns."""
    producer = spelled(call.input) if isinstance(call.input, fx.Node) else None
    if producer is not None and producer.operator in channels.PIECES:
        return channels.piece(call, producer, recording)
    if producer is not None and producer.operator in _NATIVE_NORMS:
        return sums.normalised_part(call, producer, recording)
    return indexing.indexed(call, recording) or channels.picked(call, recording)


def _copy(call: Call, recording: Recording) -> Meaning | None:
    """A copy, which may be a step of a channel shuffle."""
    return channels.passing(call, recording) or same(call, recording)


def _turned(call: Call, recording: Recording) -> Meaning | None:
    """Axes in another order, which may be a step of a channel shuffle."""
    return channels.passing(call, recording) or channels.permuted(call, recording)


def _reshaped(call: Call, recording: Recording) -> Meaning | None:
    """Another shape, which may be a step of a channel shuffle."""
    return channels.reshaped(call, recording) or channels.viewed(call, recording)


def _resized(call: Call, recording: Recording) -> Meaning | None:
    """Another size: nearest upsampling is a transposed kernel where that helps."""
    return filters.enlarged(call, recording) or channels.resized(call, recording)


def _mean(call: Call, recording: Recording) -> Meaning | None:
    """A mean over an axis of a stack, or over others."""
    return sums.total(call, recording) or channels.mean(call, recording)


_NATIVE_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training")
_DROPOUTS = "dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout"
_CASTS = "to type_as float double half bfloat16 cpu cuda"

ROWS: dict[str, Row] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), convolution.convolution),
    **{f"conv_transpose{ndim}d": convolution.transposed for ndim in (1, 2, 3)},
    "linear": products.linear,
    "matmul": products.product,
    "einsum": products.einsum,
    "addmm": products.biased_product,
    "batch_norm": sums.batch_norm,
    "instance_norm": sums.instance_norm,
    **dict.fromkeys(_NATIVE_NORMS, sums.native_batch_norm),
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm"), sums.by_input),
    "embedding": indexing.embedding,
    "add": sums.add,
    "sub": sums.sub,
    "rsub": sums.rsub,
    "mul": sums.mul,
    "div": sums.div,
    "neg": sums.neg,
    "lerp": sums.lerp,
    "addcmul": sums.addcmul,
    "stack": sums.stack,
    "sum": sums.total,
    "mean": _mean,
    "pad": indexing.filled_pad,
    "constant_pad_nd": indexing.filled_pad,
    "assigned": indexing.assigned,
    **{f"reflection_pad{ndim}d": filters.reflection_pad for ndim in (1, 2, 3)},
    **{f"replication_pad{ndim}d": filters.replication_pad for ndim in (1, 2, 3)},
    **{f"avg_pool{ndim}d": partial(filters.average_pool, ndim=ndim) for ndim in (1, 2, 3)},
    "getitem": _item,
    "slice": indexing.sliced,
    "narrow": indexing.narrowed,
    "flip": indexing.flipped,
    "index": indexing.picked,
    "index_select": indexing.index_selected,
    "select": channels.selected,
    "repeat_interleave": indexing.repeated,
    "cat": channels.cat,
    **dict.fromkeys(channels.PIECES, channels.pieces),
    "channel_shuffle": channels.shuffle,
    "pixel_unshuffle": channels.unshuffled,
    "pixel_shuffle": channels.shuffled,
    **dict.fromkeys(RESIZING, _resized),
    "view": _reshaped,
    "flatten": _reshaped,
    **dict.fromkeys(("view_as", "unsqueeze"), channels.viewed),
    "squeeze": channels.squeezed,
    "transpose": _turned,
    "permute": _turned,
    **{f"adaptive_avg_pool{ndim}d": partial(channels.adaptive_pool, ndim=ndim) for ndim in (1, 2, 3)},
    "clone": _copy,
    "contiguous": _copy,
    "detach": same,
    "positive": same,
    "getattr": attribute,
    **dict.fromkeys(_DROPOUTS.split(), dropout),
    **dict.fromkeys(_CASTS.split(), same),
    "type": cast,
    "fake_quantize_per_tensor_affine": convolution.fake_quantise,
    "fake_quantize_per_channel_affine": convolution.fake_quantise,
}


def meaning_of(node: fx.Node, recording: Recording) -> Meaning | None:
    """Return what ``node`` means to the planner, or None where it is opaque, or depends on parameters alone."""
    call = spelled(node)
    if call is None or recording.constants.name_of(node) is not None:
        return None
    row = ROWS.get(call.operator)
    return None if row is None else row(call, recording)
