"""Mistakes in the making: one thing of the original read wrongly, and the rest of the rewrite right.

A tool that takes the wrong epsilon makes the right network of another original. So each changes the original in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from mistakes.damage import Unfit, fits, undilated


def eps_times_ten(norm: Any, others: list[Any]) -> None:
    norm.eps *= 10


def eps_of_another_library(norm: Any, others: list[Any]) -> None:
    norm.eps = 1e-3


def mean_sign(norm: Any, others: list[Any]) -> None:
    norm.running_mean.neg_()


def variance_for_deviation(norm: Any, others: list[Any]) -> None:
    norm.running_var.square_()


def no_scale(norm: Any, others: list[Any]) -> None:
    fits(norm.affine)
    norm.weight.fill_(1)


def no_shift(norm: Any, others: list[Any]) -> None:
    fits(norm.affine)
    norm.bias.zero_()


def of_another_branch(norm: Any, others: list[Any]) -> None:
    """The statistics are the next normalisation's."""
    alike = [other for other in others if other is not norm and other.num_features == norm.num_features]
    fits(alike)
    for name in ("running_mean", "running_var"):
        getattr(norm, name).copy_(getattr(alike[0], name))


def branch_missing(layer: Any, others: list[Any]) -> None:
    layer.weight.zero_()
    if layer.bias is not None:
        layer.bias.zero_()


def bias_of_branch(layer: Any, others: list[Any]) -> None:
    fits(layer.bias is not None)
    layer.bias.zero_()


def branch_undilated(layer: Any, others: list[Any]) -> None:
    undilated(layer)


Slip = Callable[[Any, list[Any]], None]
NORMS: dict[str, Slip] = {
    "eps times 10": eps_times_ten,
    "eps 1e-3": eps_of_another_library,
    "mean's sign": mean_sign,
    "variance for deviation": variance_for_deviation,
    "scale forgotten": no_scale,
    "shift forgotten": no_shift,
    "statistics of another": of_another_branch,
}
LAYERS: dict[str, Slip] = {
    "branch missing": branch_missing,
    "branch without bias": bias_of_branch,
    "branch undilated": branch_undilated,
}
SLIPS = (*NORMS, *LAYERS)


def misread(make: Callable[[], nn.Module], kinds: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the original, made anew, each time with one mistake in one normalisation or layer, by its kind."""
    original = make()
    for slips, classes in ((NORMS, (_BatchNorm,)), (LAYERS, (_ConvNd, nn.Linear))):
        for path in [path for path, module in original.named_modules() if isinstance(module, classes)]:
            for name in sorted(slips.keys() & kinds):
                wrong = make()
                others = [module for module in wrong.modules() if isinstance(module, classes)]
                try:
                    with torch.no_grad():
                        slips[name](wrong.get_submodule(path), others)
                except (Unfit, AttributeError):  # no statistics, no weight of its own
                    continue
                yield name, wrong
