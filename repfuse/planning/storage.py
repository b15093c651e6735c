"""In what a fused map is stored: the dtype, device and memory format of the largest weight that it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from repfuse.algebra.evaluation import evaluate
from repfuse.algebra.expression import Expression, convolutions, tensor_names
from repfuse.recording.constants import Constants, lookup

_SMALL_RANGE = 1e6
"""What a format of less range than this holds has to be looked at: float16 ends at 65504."""
_LARGE = 1e9
"""Numbers below this leave no other format's range in the few products that a merge is made of."""


def stored_like(expression: Expression, constants: Constants, tensors: Callable[[str], Tensor]) -> Tensor:
    """Return the tensor of the model that the fused weight is to be stored like; ``tensors`` gives them by name."""
    weights = [layer.weight for layer in convolutions(expression)]
    # A filter that forward makes of numbers belongs to nobody: then the normalisation's tensors say what is wanted.
    leaves = constants.floating_leaves(weights) or constants.floating_leaves(tensor_names(expression))
    return max(map(tensors, leaves), key=Tensor.numel)


class Ranges:
    """Whether fused weights fit into the dtype of those that they replace, for the sites of one network."""

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self._tensors = lookup(constants.module, constants)

    def overflows(self, expression: Expression) -> torch.dtype | None:
        """Return the dtype that the fused weight or bias does not fit into, if it is made of finite numbers.

        The map is computed for this only where its numbers could be too large.
        """
        tensors = self._tensors
        stored = dict.fromkeys(self._constants.floating_leaves(tensor_names(expression)))
        like = stored_like(expression, self._constants, tensors)
        if torch.finfo(like.dtype).max > _SMALL_RANGE and not any(_is_large(tensors(name)) for name in stored):
            return None
        rounded = evaluate(expression, tensors, like)
        return like.dtype if left_range(rounded, map(tensors, tensor_names(expression))) else None


def left_range(rounded: Iterable[Tensor], origins: Iterable[Tensor]) -> bool:
    """Whether finite numbers became infinite when they were multiplied and rounded. (What is not a number comes from a
    negative variance, and is one in the original too.)
    """
    return any(map(_has_infinity, rounded)) and all(bool(x.isfinite().all()) for x in origins)


def _has_infinity(tensor: Tensor) -> bool:
    # A sum is one pass, and not finite if any of its numbers is not; or if it is too large itself.
    return not bool(tensor.sum().isfinite()) and bool(tensor.isinf().any())


def _is_large(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and bool(torch.stack(torch.aminmax(tensor.detach())).abs().max() > _LARGE)
