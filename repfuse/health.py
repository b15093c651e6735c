"""Weights that look wrong: numbers that are none, branches that are all zero, variances that no data gives.

A rewrite keeps what they compute. They are reported because people meet them for the first time when the converted
model is looked at, and then blame the conversion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

Ailment = Literal["nan", "infinite", "all-zero", "negative-variance", "small-variance"]

MEANINGS: dict[Ailment, str] = {
    "nan": "not a number: whatever reads them gives NaN",
    "infinite": "infinite: whatever reads them gives infinities or NaN",
    "all-zero": "all zero: the branch adds a constant or nothing",
    "negative-variance": "negative variances: these channels are scaled wrongly, or NaN",
    "small-variance": "running variances below eps: these channels hardly varied; they are scaled up, to 1/sqrt(eps)",
}


@dataclass(frozen=True)
class Anomaly:
    """``count`` of the ``of`` numbers in the parameter or buffer ``name`` suffer from ``what``."""

    name: str
    what: Ailment
    count: int
    of: int


def examine(network: nn.Module) -> tuple[Anomaly, ...]:
    """Return what looks wrong in the weights of a network, in its order; a shared tensor once."""
    from repfuse.networks import named_tensors

    found: list[Anomaly] = []
    for name, tensor in named_tensors(network):
        numbers = _numbers(tensor)
        may_be_none = numbers.is_floating_point() or numbers.is_complex()
        if may_be_none and not all(map(math.isfinite, _extremes(numbers))):
            found += _counted(name, {"nan": numbers.isnan(), "infinite": numbers.isinf()})
    seen = {anomaly.name for anomaly in found}
    for path, module in network.named_modules():
        found += [anomaly for anomaly in _of_module(path, module) if anomaly.name not in seen]
    return tuple(found)


def _numbers(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor in a dtype that torch computes with."""
    from repfuse.networks import dense

    numbers = dense(tensor)
    return numbers.float() if numbers.is_floating_point() and numbers.itemsize == 1 else numbers


def _extremes(numbers: Tensor) -> tuple[float, float]:
    """Return the least and the largest of the numbers; NaN, where there is one: in one pass, and no copy."""
    import torch

    if numbers.is_complex():
        numbers = torch.view_as_real(numbers.resolve_conj())
    if not numbers.numel():
        return 0.0, 0.0
    least, most = numbers.aminmax()
    return float(least), float(most)


def _counted(name: str, wrong: dict[Ailment, Tensor]) -> Iterator[Anomaly]:
    """Yield what some of the numbers of a tensor suffer from, by where they do."""
    for what, where in wrong.items():
        if count := int(where.sum()):
            yield Anomaly(name, what, count, where.numel())


def _of_module(path: str, module: nn.Module) -> Iterator[Anomaly]:
    """Yield what is wrong with a layer: only there it is known what a tensor is for."""
    from torch.nn.modules.batchnorm import _NormBase
    from torch.nn.modules.conv import _ConvNd
    from torch.nn.modules.linear import Linear

    from repfuse.networks import join

    if not isinstance(module, _NormBase | _ConvNd | Linear):
        return
    weight, variance = module.weight, getattr(module, "running_var", None)
    if weight is not None and weight.numel() and _extremes(_numbers(weight)) == (0, 0):
        yield Anomaly(join(path, "weight"), "all-zero", weight.numel(), weight.numel())
    if variance is not None and isinstance(module, _NormBase):
        small = (variance >= 0) & (variance < module.eps)
        yield from _counted(join(path, "running_var"), {"negative-variance": variance < 0, "small-variance": small})
