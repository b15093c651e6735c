"""Normalisations with frozen statistics: ``y = weight * (x - mean) / sqrt(var + eps) + bias``, channel by channel.

Instance normalisation that tracks statistics uses them in inference, and is then the same map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from repfuse.algebra.expression import Scaled
from repfuse.algebra.layers import Normalisation
from repfuse.ops.call import Call, constant, is_data, number
from repfuse.ops.meaning import Meaning, Passage, Unfusible
from repfuse.ops.spelling import spelled

if TYPE_CHECKING:
    from repfuse.recording.recording import Recording

_TENSORS = ("running_mean", "running_var", "weight", "bias")
_DEFAULT_EPS = 1e-5


def batch_norm(call: Call, recording: Recording) -> Meaning | None:
    """Batch normalisation: affine unless ``training``."""
    return _normalisation(call, recording, by_batch=call.get("training", False))


def instance_norm(call: Call, recording: Recording) -> Meaning | None:
    """Instance normalisation: affine where it does not use the statistics of the input."""
    return _normalisation(call, recording, by_batch=call.get("use_input_stats", True))


def by_input(_call: Call, _recording: Recording) -> Meaning | None:
    """LayerNorm, RMSNorm, GroupNorm: ``(x - mean(x)) / std(x)`` is no affine map of x."""
    return Unfusible("input-statistics", "the normalisation uses the statistics of what it is given")


def native_batch_norm(call: Call, recording: Recording) -> Meaning | None:
    """ATen's normalisation, which returns its result with the statistics; ``normalised_part`` is the result."""
    meaning = batch_norm(call, recording)
    read = all(_is_first_part(user, call.node) for user in call.node.users if user.users)
    return Passage((meaning.input,)) if isinstance(meaning, Scaled) and read else None


def normalised_part(call: Call, producer: Call, recording: Recording) -> Meaning | None:
    """Part 0 of what ``native_batch_norm`` returns."""
    return batch_norm(producer, recording) if call.get("index") == 0 else None


def _is_first_part(user: fx.Node, node: fx.Node) -> bool:
    call = spelled(user)
    return call is not None and call.operator == "getitem" and call.input is node and call.get("index") == 0


def _normalisation(call: Call, recording: Recording, *, by_batch: object) -> Meaning | None:
    x, given = call.input, [call.get(name) for name in _TENSORS]
    if not is_data(x, recording) or len(recording.shape_of[x]) < 2:
        return None
    if by_batch is not False or given[0] is None or given[1] is None:
        return Unfusible("training-norm", "the normalisation uses the statistics of the batch")
    tensors = [constant(tensor, recording) for tensor in given]
    if any(tensor is None for tensor, argument in zip(tensors, given, strict=True) if argument is not None):
        return Unfusible("computed-weight", "statistics or affine parameters of the normalisation depend on the input")
    eps = number(call.get("eps", _DEFAULT_EPS))
    if eps is None:
        return Unfusible("computed-weight", "the eps of the normalisation is computed in forward")
    mean, var, weight, bias = (None if tensor is None else tensor.name for tensor in tensors)
    return Scaled(x, Normalisation(str(mean), str(var), weight, bias, eps), axis=1)
