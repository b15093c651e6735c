"""One set of inputs for a call of both networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """One set of inputs for a call of both networks, and what to call it in a report.

    ``yardstick`` says whether the effect of rounding is measured on it in any case, which takes several runs of each
    network; elsewhere it borrows. ``otherwise`` makes what to try in its place, in this order, where the original
    refuses it (see ``repfuse.verifying.fallback``).
    """

    label: str
    inputs: tuple[Any, ...]
    yardstick: bool = True
    otherwise: Callable[[], Iterable[Trial]] = tuple

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shape of each tensor input."""
        return tuple(tuple(x.shape) for x in tree_leaves(self.inputs) if isinstance(x, torch.Tensor))

    @property
    def work(self) -> int:
        """How much a network has to do on it, roughly: the number of elements of its tensors."""
        return elements(self.inputs)


def elements(inputs: Any) -> int:
    """Return how many elements the tensors among the inputs have."""
    return sum(x.numel() for x in tree_leaves(inputs) if isinstance(x, torch.Tensor))


def mapped(trial: Trial, change: Callable[[tuple[Any, ...]], Any]) -> Trial:
    """Return the trial with changed inputs, also of what may take its place."""
    others = trial.otherwise
    return replace(
        trial, inputs=tuple(change(trial.inputs)), otherwise=lambda: (mapped(other, change) for other in others())
    )


def rounded_through(trial: Trial, dtype: torch.dtype | None) -> Trial:
    """Return the trial with floating inputs that both their own dtype and ``dtype`` hold exactly."""
    if dtype is None:
        return trial
    return mapped(trial, lambda inputs: tree_map(lambda x: x.to(dtype).to(x.dtype) if is_floating(x) else x, inputs))


def is_floating(x: Any) -> bool:
    """Whether ``x`` is a tensor of floating numbers."""
    return isinstance(x, torch.Tensor) and x.is_floating_point()
