"""How much is tried: the inputs of each level of effort."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from repfuse.errors import RepfuseError

# One set of inputs for a call of both networks.


Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """One set of inputs for a call of both networks, and what to call it in a report.

    ``sampled`` says whether the effect of rounding is measured on it in any case, which takes several runs of each
    network; elsewhere it borrows. ``otherwise`` makes what to try in its place, in this order, where the original
    refuses it (see ``repfuse.checking.comparison``).
    """

    label: str
    inputs: tuple[Any, ...]
    sampled: bool = True
    otherwise: Callable[[], Iterable[Trial]] = tuple

    @property
    def shapes(self) -> tuple[Sizes, ...]:
        """The shape of each tensor input."""
        return tuple(tuple(x.shape) for x in tree_leaves(self.inputs) if isinstance(x, torch.Tensor))

    @property
    def work(self) -> int:
        """How much a network has to do on it, roughly: the number of elements of its tensors."""
        return sum(x.numel() for x in tree_leaves(self.inputs) if isinstance(x, torch.Tensor))


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


class Effort(StrEnum):
    """How many inputs are tried, and how large ones."""

    QUICK = "quick"
    """The example, and noise of a few sizes up to a quarter of it, or longer along an axis: seconds."""

    DEFAULT = "default"
    """The example, every kind of input at about half of its size, and small sizes, odd and even."""

    THOROUGH = "thorough"
    """More random inputs, every kind at three sizes, larger batches, and 32 sizes in a row: each phase of a stride."""


@dataclass(frozen=True)
class Scope:
    """What an effort comes to.

    ``parts`` are the divisors of the example's size at which the first ``kinds`` (or all) are tried, ``small`` the
    sizes of a few pixels, ``in_a_row`` how many consecutive sizes, ``batches`` what is added to the batch. On
    ``sampled`` trials the effect of rounding is measured in any case, which costs as much as the network has weights. A
    site by itself is tried at its last ``of_site`` sizes.
    """

    seeds: tuple[int, ...]
    parts: tuple[int, ...]
    small: tuple[int, ...]
    sampled: int
    batches: tuple[int, ...] = (1,)
    in_a_row: int = 0
    kinds: int | None = None
    of_site: int = 4


# Small sizes are less than a kernel's reach, odd and even: there mistakes at the border are all there is.
SCOPES = {
    Effort.QUICK: Scope(seeds=(0,), parts=(4,), small=(2,), sampled=1, kinds=1, of_site=1),
    Effort.DEFAULT: Scope(seeds=(0,), parts=(2,), small=(1, 2, 3, 5, 7), sampled=3),
    Effort.THOROUGH: Scope((0, 1, 2, 3), (1, 2, 4), (1, 2, 3, 4, 5, 6, 7, 9), sampled=7, batches=(1, 6), in_a_row=32),
}


def known_effort(effort: Effort | str) -> Effort:
    """Return the effort of this name. Raises RepfuseError where there is none."""
    if effort not in SCOPES:
        raise RepfuseError(f"There is no effort {str(effort)!r}.", "", f"Choose one of {', '.join(SCOPES)}.")
    return Effort(effort)
