"""What each operator means: a row per operator, whatever its spelling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import fx

from repfuse.ops import channels, convolution, indexing, products, sums
from repfuse.ops.meaning import Meaning, Same, Unfusible
from repfuse.ops.spelling import CASTS, DROPOUTS, RESIZING, Call, is_data, spelled
from repfuse.recording.recording import Recording

Row = Callable[[Call, Recording], Meaning | None]


def _either(*rows: Row) -> Row:
    """The first of these meanings that there is."""

    def first(call: Call, recording: Recording) -> Meaning | None:
        found = (row(call, recording) for row in rows)
        return next((meaning for meaning in found if meaning is not None), None)

    return first


def _always(code: str, reason: str) -> Row:
    return lambda _call, _recording: Unfusible(code, reason)


def _same(call: Call, _recording: Recording) -> Meaning | None:
    """``y = x``, in inference. Whether a cast changes the dtype, the recording tells the planner."""
    return Same(call.input)


def _item(call: Call, recording: Recording) -> Meaning | None:
    """``x[index]``: a part of a tensor, or one of the values that a node returns."""
    producer = spelled(call.input) if isinstance(call.input, fx.Node) else None
    if producer is not None and producer.operator in channels.PIECES:
        return channels.piece(call, producer, recording)
    if producer is not None and producer.operator in _NATIVE_NORMS:
        return sums.normalised_part(call, producer, recording)
    return indexing.indexed(call, recording) or channels.picked(call, recording)


_NATIVE_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training")
_BY_INPUT = _always("input-statistics", "the normalisation uses the statistics of what it is given")
_BY_NUMBER = _always("embedding", "its input says which rows of the table to take")
_ROUNDED = _always("fake-quantised", "the value is rounded as a quantised one would be")

OF_ANY: dict[str, Row] = {
    "matmul": products.product,
    "einsum": products.einsum,
    "addmm": products.biased_product,
    "add": sums.add,
    "sub": partial(sums.add, sign=-1.0),
    "rsub": sums.rsub,
    "mul": sums.mul,
    "lerp": sums.lerp,
    "addcmul": sums.addcmul,
    "stack": sums.stack,
    "cat": channels.cat,
    "getitem": _item,
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm"), _BY_INPUT),
    "embedding": _BY_NUMBER,
    **{f"fake_quantize_per_{what}_affine": _ROUNDED for what in ("tensor", "channel")},
}
"""Operators whose first argument may be something else than a tensor that depends on the input of the model."""

ROWS: dict[str, Row] = {
    **OF_ANY,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), convolution.convolution),
    **{f"conv_transpose{ndim}d": convolution.transposed for ndim in (1, 2, 3)},
    "linear": products.linear,
    **dict.fromkeys(("batch_norm", "instance_norm"), sums.norm),
    **dict.fromkeys(_NATIVE_NORMS, sums.native_batch_norm),
    "div": sums.div,
    "neg": sums.neg,
    "sum": sums.total,
    "mean": _either(sums.total, channels.mean),
    **dict.fromkeys(("pad", "constant_pad_nd"), indexing.filled_pad),
    "assigned": indexing.assigned,
    **{f"reflection_pad{ndim}d": partial(convolution.pad, mode="reflect") for ndim in (1, 2, 3)},
    **{f"replication_pad{ndim}d": partial(convolution.pad, mode="replicate") for ndim in (1, 2, 3)},
    **{f"avg_pool{ndim}d": partial(convolution.average_pool, ndim=ndim) for ndim in (1, 2, 3)},
    "index": indexing.indexed,
    **dict.fromkeys(("slice", "narrow", "index_select", "repeat_interleave"), indexing.along),
    "flip": indexing.flipped,
    "select": channels.selected,
    **dict.fromkeys(channels.PIECES, channels.pieces),
    "channel_shuffle": channels.shuffle,
    "pixel_unshuffle": channels.unshuffled,
    "pixel_shuffle": channels.shuffled,
    **dict.fromkeys(RESIZING, _either(convolution.enlarged, channels.resized)),
    **dict.fromkeys(("view", "flatten"), _either(channels.reshaped, channels.viewed)),
    **dict.fromkeys(("view_as", "unsqueeze"), channels.viewed),
    "squeeze": channels.squeezed,
    **dict.fromkeys(("transpose", "permute"), _either(channels.passing, channels.permuted)),
    **{f"adaptive_avg_pool{ndim}d": partial(channels.adaptive_pool, ndim=ndim) for ndim in (1, 2, 3)},
    **dict.fromkeys(("clone", "contiguous"), _either(channels.passing, _same)),
    **dict.fromkeys(("detach", "positive", "to", "type_as", "cuda", *CASTS), _same),
    "type": lambda call, _recording: None if call.get("dtype") is None else Same(call.input),  # else it is a string
    "getattr": lambda call, _recording: Same(call.input) if call.get("attribute") == "data" else None,
    **dict.fromkeys(
        DROPOUTS, lambda call, _recording: Same(call.input) if call.get("training", True) is False else None
    ),
}


def meaning_of(node: fx.Node, recording: Recording) -> Meaning | None:
    """Return what ``node`` means to the planner, or None where it is opaque, or depends on parameters alone."""
    call = spelled(node)
    if call is None or call.operator not in ROWS or recording.constants.name_of(node) is not None:
        return None
    usable = call.operator in OF_ANY or is_data(call.input, recording)
    return ROWS[call.operator](call, recording) if usable else None
