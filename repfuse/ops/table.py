"""What each operator means: a row per operator, whatever its spelling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import fx

from repfuse.ops import border, channels, convolution, filters, indexing, noops, norms, quantisation, shuffle, sums
from repfuse.ops.call import Call
from repfuse.ops.meaning import Meaning
from repfuse.ops.spelling import spelled

if TYPE_CHECKING:
    from repfuse.recording.recording import Recording

Row = Callable[[Call, "Recording"], Meaning | None]


def _item(call: Call, recording: Recording) -> Meaning | None:
    """``x[index]``: a part of a tensor, or one of the values that a node returns."""
    producer = spelled(call.input) if isinstance(call.input, fx.Node) else None
    if producer is not None and producer.operator in channels.PIECES:
        return channels.piece(call, producer, recording)
    if producer is not None and producer.operator in _NATIVE_NORMS:
        return norms.normalised_part(call, producer, recording)
    return indexing.indexed(call, recording)


def _copy(call: Call, recording: Recording) -> Meaning | None:
    """A copy, which may be a step of a channel shuffle."""
    return shuffle.passing(call, recording) or noops.same(call, recording)


_NATIVE_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training")
_DROPOUTS = "dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout"
_CASTS = "to type_as float double half bfloat16 cpu cuda"

ROWS: dict[str, Row] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), convolution.convolution),
    **{f"conv_transpose{ndim}d": convolution.transposed for ndim in (1, 2, 3)},
    "linear": convolution.linear,
    "matmul": convolution.product,
    "addmm": convolution.biased_product,
    "batch_norm": norms.batch_norm,
    "instance_norm": norms.instance_norm,
    **dict.fromkeys(_NATIVE_NORMS, norms.native_batch_norm),
    "add": sums.add,
    "sub": sums.sub,
    "rsub": sums.rsub,
    "mul": sums.mul,
    "div": sums.div,
    "neg": sums.neg,
    "lerp": sums.lerp,
    "stack": sums.stack,
    "sum": sums.total,
    "mean": sums.total,
    "pad": border.filled_pad,
    "constant_pad_nd": border.filled_pad,
    "assigned": border.assigned,
    **{f"reflection_pad{ndim}d": filters.reflection_pad for ndim in (1, 2, 3)},
    **{f"replication_pad{ndim}d": filters.replication_pad for ndim in (1, 2, 3)},
    **{f"avg_pool{ndim}d": partial(filters.average_pool, ndim=ndim) for ndim in (1, 2, 3)},
    "getitem": _item,
    "slice": indexing.sliced,
    "narrow": indexing.narrowed,
    "flip": indexing.flipped,
    "cat": channels.cat,
    **dict.fromkeys(channels.PIECES, channels.pieces),
    "channel_shuffle": shuffle.shuffle,
    "view": shuffle.reshaped,
    "flatten": shuffle.reshaped,
    "transpose": shuffle.passing,
    "permute": shuffle.passing,
    "clone": _copy,
    "contiguous": _copy,
    "detach": noops.same,
    "positive": noops.same,
    "getattr": noops.attribute,
    **dict.fromkeys(_DROPOUTS.split(), noops.dropout),
    **dict.fromkeys(_CASTS.split(), noops.same),
    "type": noops.cast,
    "fake_quantize_per_tensor_affine": quantisation.fake_quantise,
    "fake_quantize_per_channel_affine": quantisation.fake_quantise,
}
