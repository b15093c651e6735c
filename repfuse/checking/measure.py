"""Two tensors against each other: the numbers of an OutputError."""

from __future__ import annotations

import math

import numpy as np
import torch

from repfuse.checking.results import Level, OutputError, quotient
from repfuse.wording import dtype_name

QUANTILES = (50, 90, 99, 100)


def level(reference: torch.Tensor, other: torch.Tensor) -> Level:
    """Return the relative difference of ``other`` from ``reference``, two tensors of the same shape.

    Infinite where infinities or NaNs are not in the same places; elements that are not finite in both are
    left out otherwise.
    """
    a, b, alike = _finite_pairs(reference, other)
    if not alike:
        return Level(float("inf"), float("inf"))
    difference = (a - b).abs()
    return Level(quotient(_norm(difference), _norm(a)), quotient(_largest(difference), _largest(a)))


def half_the_digits(dtype: torch.dtype) -> float:
    """Return the relative error that half of the digits of a dtype allow, and wrong algebra exceeds: sqrt(eps)."""
    return math.sqrt(torch.finfo(dtype).eps) if dtype.is_floating_point else 0.0


def output_error(name: str, reference: torch.Tensor, other: torch.Tensor) -> OutputError:
    """Return every number about one output, two tensors of the same shape with the same non-finite places."""
    difference = (_wide(reference) - _wide(other)).abs()
    difference = torch.where(torch.isfinite(difference), difference, 0)
    worst = _index_of_largest(difference)
    a, b, _ = _finite_pairs(reference, other)
    return OutputError(
        name=name,
        shape=tuple(reference.shape),
        dtype=dtype_name(reference.dtype),
        relative=level(reference, other),
        max_abs=_largest(difference),
        scale=_largest(a),
        quantiles=_quantiles((a - b).abs()),
        smallest_rtol=_smallest_rtol(a, b),
        worst=worst,
        values=(_number(reference, worst), _number(other, worst)) if reference.numel() else (0.0, 0.0),
        non_finite=reference.numel() - a.numel(),
    )


def mismatch(reference: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str:
    """Say what differs between two networks' outputs that is no finite number, or return ""."""
    if reference.keys() != other.keys():
        return f"the original returns {_names(reference)}, the fused network {_names(other)}"
    for name, a in reference.items():
        b = other[name]
        if a.shape != b.shape:
            return f"{name} is {_shape(a)} in the original and {_shape(b)} in the fused network"
        if a.dtype != b.dtype:
            return f"{name} is {a.dtype} in the original and {b.dtype} in the fused network"
        if not _finite_pairs(a, b)[2]:
            return f"{name} is infinite or not a number in other places than in the original"
    return ""


def informative(reference: torch.Tensor) -> bool:
    """Whether the tensor has a finite element other than 0: without one there is nothing to compare."""
    wide = _wide(reference)
    return bool((torch.isfinite(wide) & (wide != 0)).any())


def _finite_pairs(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return the finite elements of both, flat, and whether the others are equal in both."""
    a, b = _wide(a).flatten(), _wide(b).flatten()
    finite = torch.isfinite(a)
    if bool(finite.all()) and bool(torch.isfinite(b).all()):
        return a, b, True
    alike = torch.equal(finite, torch.isfinite(b))
    if alike:
        alike = torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num())
    both = finite & torch.isfinite(b)
    return a[both], b[both], alike


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers in float64, wide enough that the comparison adds no error of its own."""
    return tensor.to(torch.float64)


def _index_of_largest(tensor: torch.Tensor) -> tuple[int, ...]:
    if not tensor.numel():
        return ()
    return tuple(map(int, np.unravel_index(int(tensor.argmax()), tensor.shape)))


def _quantiles(difference: torch.Tensor) -> dict[str, float]:
    ordered = difference.sort().values
    if not len(ordered):
        return {}
    return {str(q): float(ordered[-(-q * len(ordered) // 100) - 1]) for q in QUANTILES}


def _smallest_rtol(a: torch.Tensor, b: torch.Tensor) -> float | None:
    wrong = a != b
    if bool((wrong & (a == 0)).any()):
        return None
    return _largest((a[wrong] - b[wrong]).abs() / a[wrong].abs())


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _number(tensor: torch.Tensor, index: tuple[int, ...]) -> float:
    return float(_wide(tensor)[index])


def _names(outputs: dict[str, torch.Tensor]) -> str:
    return ", ".join(outputs) or "nothing"


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
